"""Write the programs in bin/ as installed copies that know their interpreter and their katashim.

    python3 katashim/shim/install.py [--destdir DIR] [--prefix /usr/local] [--python PATH] [--root DIR]

Puts ``containerd-shim-katashim-v2`` (which containerd looks for in its PATH) and ``katashim-ctl``
into ``<destdir><prefix>/bin`` and compiles the package's bytecode, for a shim that compiles itself at
each start is late. Called by ``make install`` and the Dockerfile; needs only the standard library.
"""

import argparse
import compileall
import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))
SOURCE_ROOT = os.path.dirname(os.path.dirname(_HERE))
PROGRAMS = ("containerd-shim-katashim-v2", "katashim-ctl")


def program_text(name, python, root):
    """The text of the program `name`, for the interpreter at `python` and the package below `root`."""
    with open(os.path.join(SOURCE_ROOT, "bin", name)) as source:
        text = source.read()
    if "'" in python + root or '"' in root or "\\" in root:
        raise ValueError(f"quotes and backslashes in {python} or {root} cannot be written into a program")
    return text.replace("python=@PYTHON@", f"python='{python}'").replace('"@ROOT@"', f'"{root}"')


def install(folder, python, root):
    """Write all programs into `folder`; returns their paths. A running one is replaced, not overwritten."""
    os.makedirs(folder, exist_ok=True)
    paths = []
    for name in PROGRAMS:
        path = os.path.join(folder, name)
        with open(path + ".new", "w") as fresh:
            fresh.write(program_text(name, python, root))
        os.chmod(path + ".new", 0o755)
        os.rename(path + ".new", path)
        paths.append(path)
    return paths


def main(arguments):
    parser = argparse.ArgumentParser(description="install katashim's programs")
    parser.add_argument("--destdir", default="", help="root of the tree to install into, for packagers")
    parser.add_argument("--prefix", default="/usr/local")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has requirements.txt")
    parser.add_argument("--root", default=SOURCE_ROOT, help="the directory that holds the package katashim")
    options = parser.parse_args(arguments)
    python, root = os.path.abspath(options.python), os.path.abspath(options.root)
    for path in install(options.destdir + os.path.join(options.prefix, "bin"), python, root):
        print(path)
    compiled = os.path.join(root, "katashim")
    if os.path.isdir(compiled):         # not there when a packager installs for another machine
        compileall.compile_dir(compiled, quiet=1)


if __name__ == "__main__":
    main(sys.argv[1:])
