"""The words of ``katashim-ctl guest``: build the image, show what is there.

katashim-ctl's parser calls :func:`add_arguments` and then :func:`main`; ``python -m
katashim.guest.cli build`` does the same without it.
"""

import json
import sys
import time

from katashim.errors import KatashimError, NotFound
from katashim.guest import build, cache


def add_arguments(parser):
    """Give an argparse parser the sub-commands ``build`` and ``show``."""
    commands = parser.add_subparsers(dest="guest_command", required=True, metavar="COMMAND")
    make = commands.add_parser("build", help="build kernel, initrd and root image from Debian packages")
    make.add_argument("--output", metavar="DIR", default=build.DEFAULT_OUTPUT,
                      help="where to put the guest (default: %(default)s)")
    make.add_argument("--kernel", choices=build.KERNELS, default="debian",
                      help="Debian's cloud kernel, or a small fast one built from Debian's source (minutes)")
    make.add_argument("--cache", metavar="DIR", default=cache.DEFAULT_DIR,
                      help="where packages and kernels are kept (default: %(default)s)")
    make.add_argument("--update", action="store_true", help="look for newer packages")
    make.add_argument("--standalone", action="store_true",
                      help="also write standalone.img, an initrd that carries the root along")
    make.add_argument("--jobs", type=int, help="compiler processes for --kernel source")
    show = commands.add_parser("show", help="print the manifest of a guest")
    show.add_argument("--output", metavar="DIR", default=build.DEFAULT_OUTPUT, help="the guest's directory")


def main(args):
    """Run what `args` (parsed) ask for; returns the exit status.

    :raises KatashimError: it failed.
    """
    if args.guest_command == "show":
        manifest = build.read_manifest(args.output)
        if manifest is None:
            raise NotFound(f"there is no guest in {args.output}: katashim-ctl guest build")
        print(json.dumps(manifest, indent=1, sort_keys=True))
        return 0
    start = time.monotonic()

    def progress(text):
        print(f"[{time.monotonic() - start:6.1f} s] {text}", flush=True)

    build.build(args.output, args.kernel, progress, cache_dir=args.cache, update=args.update,
                standalone=args.standalone, jobs=args.jobs)
    return 0


def _script():
    import argparse
    parser = argparse.ArgumentParser(prog="katashim-ctl guest", description=__doc__.partition("\n")[0])
    add_arguments(parser)
    try:
        return main(parser.parse_args())
    except KatashimError as exc:
        print(f"katashim-ctl guest: {exc.full_text()}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(_script())
