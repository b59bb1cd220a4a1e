"""What containerd executes: start, delete, -info, -v, and the daemon. `main.py` is where it begins."""
