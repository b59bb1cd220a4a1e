"""katashim-ctl: the administrator's tool. `main.py` is the frame, one module for each command."""
