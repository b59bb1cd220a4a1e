"""``katashim-ctl guest build``: a directory with all that a hypervisor needs to boot our guest.

    vmlinux         uncompressed kernel
    initrd.img      small RAM disk that reaches the root image
    rootfs.img      the root, EROFS, read-only
    standalone.img  on demand: an initrd that carries the root along, for hosts that boot from an initrd alone
    manifest.json   what is in them, and how a host boots them

Made from Debian packages and our sources, the same bytes from the same inputs, in layers that are
kept (cache.py): a change of the agent costs two seconds, and needs no network. The manifest is
written last, so a directory with a manifest is whole.
"""

import glob
import json
import os
import shutil
import tempfile

from katashim import VERSION
from katashim.errors import InvalidArgument
from katashim.guest import cache, initrd, kernel, rootfs

DEFAULT_OUTPUT = "/var/lib/katashim/guest"
FORMAT = 1
KERNELS = ("debian", "source")

# What a host puts on the kernel's command line for this guest, beside its own console and root=.
KERNEL_PARAMS = ("systemd.unified_cgroup_hierarchy=1", "cgroup_no_v1=all")
_OUTPUT_WAIT_S = 120
_HERE = os.path.dirname(os.path.abspath(__file__))
_BUILDERS = ("build.py", "initrd.py", "initrd.sh", "kernel.py", "rootfs.py", "tables.py", "wire.py")


def build(output_dir=DEFAULT_OUTPUT, kernel_flavour="debian", progress=print, *, cache_dir=cache.DEFAULT_DIR,
          update=False, standalone=False, jobs=None):
    """Make the guest in `output_dir`, or find that it is there already.

    :param kernel_flavour: "debian": the cloud kernel of the Debian package; "source": the small one that
        boots twice as fast, built from Debian's source (takes minutes).
    :param progress: called with a line of text at each step.
    :param update: ask Debian's archive for newer packages, instead of using those that are cached.
    :param standalone: write ``standalone.img`` too.
    :param jobs: compiler processes at a time, for "source"; None = one per CPU.
    :returns: the manifest, a dict.
    :raises InvalidArgument: no such kernel. :raises FailedPrecondition: a program is missing; says which
        Debian package has it. :raises Internal: a step failed; carries the end of its output.
    """
    if kernel_flavour not in KERNELS:
        raise InvalidArgument(f"there is no kernel {kernel_flavour!r}, only {' and '.join(KERNELS)}")
    recipe = recipe_of(kernel_flavour, standalone)
    if not update:
        manifest = read_manifest(output_dir)
        if manifest is not None and manifest["recipe"] == recipe and _is_whole(output_dir, manifest):
            progress(f"the guest in {output_dir} is up to date")
            return manifest
    rootfs.require_tools()
    kernel.require_tools(kernel_flavour)
    layers = cache.Cache(cache_dir)
    if update:
        layers.drop("packages")
    packages, base, kernel_layer = _layers(layers, kernel_flavour, progress, jobs)
    os.makedirs(output_dir, exist_ok=True)
    with cache.Lock(os.path.join(output_dir, ".lock"), _OUTPUT_WAIT_S, output_dir):
        manifest = _assemble(output_dir, recipe, kernel_flavour, standalone, packages, base, kernel_layer,
                             progress)
    layers.prune()
    return manifest


def recipe_of(kernel_flavour, standalone=False):
    """The hash of everything that we decide: our sources and the choice of kernel and files."""
    paths = [os.path.join(_HERE, name) for name in _BUILDERS] + [kernel.CONFIG] + rootfs.agent_sources()
    paths.append(rootfs.tables.DESCRIPTORS)
    return cache.key_of(FORMAT, VERSION, kernel_flavour, standalone,
                        [cache.file_hash(path) for path in paths])


def read_manifest(output_dir):
    """The manifest of a guest directory, or None when there is none that we can read."""
    try:
        with open(os.path.join(output_dir, "manifest.json")) as file:
            manifest = json.load(file)
    except (FileNotFoundError, ValueError):
        return None
    return manifest if manifest.get("format") == FORMAT else None


def _is_whole(output_dir, manifest):
    return all(os.path.exists(path) and os.path.getsize(path) == facts["bytes"]
               for path, facts in ((os.path.join(output_dir, name), facts)
                                   for name, facts in manifest["files"].items()))


def _layers(layers, kernel_flavour, progress, jobs):
    """The directories (packages, base root, kernel), each made when it is not cached."""
    wanted = (rootfs.SUITE, rootfs.PACKAGES, rootfs.KERNEL_PACKAGE[kernel_flavour])
    packages = layers.layer("packages", cache.key_of(*wanted),
                            lambda path: rootfs.fetch_packages(path, kernel_flavour, progress))
    versions = rootfs.versions(packages)

    def make_base(path):
        progress("unpacking the root")
        rootfs.unpack_base(packages, path)

    def make_kernel(path):
        package = os.path.join(packages, "kernel.deb")
        if kernel_flavour == "source":
            kernel.from_source(package, path, jobs or os.cpu_count(), progress)
        else:
            progress("unpacking the kernel")
            kernel.from_package(package, path)

    base = layers.layer("base", cache.key_of(versions, cache.file_hash(rootfs.__file__)), make_base)
    # A kernel that takes minutes to build is not built anew for each change of our code.
    sources = ((kernel.SOURCE_RECIPE, cache.file_hash(kernel.CONFIG)) if kernel_flavour == "source"
               else cache.file_hash(kernel.__file__))
    kernel_key = cache.key_of(cache.file_hash(os.path.join(packages, "kernel.deb")), sources)
    kernel_layer = layers.layer(f"kernel-{kernel_flavour}", kernel_key, make_kernel)
    return packages, base, kernel_layer


def _assemble(output_dir, recipe, kernel_flavour, standalone, packages, base, kernel_layer, progress):
    """Write all files into a directory beside `output_dir`'s, then put them in place, the manifest last."""
    for left in glob.glob(os.path.join(output_dir, ".making-*")):
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=output_dir) as work:
        new = os.path.join(work, "new")
        os.mkdir(new)
        shutil.copyfile(os.path.join(kernel_layer, "vmlinux"), os.path.join(new, "vmlinux"))
        progress("writing the initrd")
        _write(os.path.join(new, "initrd.img"), initrd.make(base, kernel_layer))
        progress("writing the root image")
        image = os.path.join(new, "rootfs.img")
        rootfs.make_image(base, kernel_layer, work, image)
        if standalone:
            progress("writing the initrd that carries the root")
            _write(os.path.join(new, "standalone.img"), initrd.make(base, kernel_layer, image))
        with open(os.path.join(kernel_layer, "release")) as file:
            release = file.read()
        files = {name: _facts(os.path.join(new, name)) for name in sorted(os.listdir(new))}
        manifest = {
            "format": FORMAT, "katashim": VERSION, "recipe": recipe,
            "kernel": {"flavour": kernel_flavour, "release": release}, "kernel_params": list(KERNEL_PARAMS),
            "root": {"device": "/dev/vda", "fstype": "erofs", "init": "/sbin/init"},
            "files": files, "packages": rootfs.versions(packages)}
        with open(os.path.join(new, "manifest.json"), "w") as file:
            json.dump(manifest, file, indent=1, sort_keys=True)
            file.write("\n")
        if os.path.exists(os.path.join(output_dir, "manifest.json")):
            os.unlink(os.path.join(output_dir, "manifest.json"))
        for name in (*files, "manifest.json"):
            os.replace(os.path.join(new, name), os.path.join(output_dir, name))
    progress(f"the guest is in {output_dir}: kernel {release}")
    return manifest


def _facts(path):
    return {"bytes": os.path.getsize(path), "sha256": cache.file_hash(path)}


def _write(path, data):
    with open(path, "wb") as file:
        file.write(data)
