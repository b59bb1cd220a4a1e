"""An OCI image with busybox, made on the spot from Debian's busybox-static.

The archive follows the OCI image layout, and names itself by containerd's annotation, so that ``ctr
image import`` of any containerd from 1.6 on takes it without more words. The same bytes come out each
time: all dates are zero.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile

NAME = "localhost/busybox:latest"

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_DIRECTORIES = ("bin", "dev", "etc", "proc", "root", "sys", "tmp", "var", "var/tmp")
_FILES = {
    "etc/passwd": b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": b"root:x:0:\nnogroup:x:65534:\n",
    "etc/hostname": b"busybox\n",
}


def write(path, name=NAME, files=None, config=None):
    """Write the image's archive to `path`.

    :param name: what containerd calls it after the import.
    :param files: more files of the root, ``{"etc/x": bytes}``; executable below bin/.
    :param config: fields of the image's run configuration over ours, such as ``{"User": "nobody"}``.
    :returns: `path`.
    """
    layer = _layer({**_FILES, **(files or {})})
    settings = {"Env": ["PATH=/bin"], "Cmd": ["/bin/sh"], "WorkingDir": "/", **(config or {})}
    architecture = _ARCHITECTURES[os.uname().machine]
    image = _json({
        "architecture": architecture, "os": "linux", "config": settings,
        "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
        "history": [{"created_by": "katashim's tests"}]})
    manifest = _json({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": _descriptor("application/vnd.oci.image.config.v1+json", image),
        "layers": [_descriptor("application/vnd.oci.image.layer.v1.tar", layer)]})
    entry = _descriptor("application/vnd.oci.image.manifest.v1+json", manifest)
    entry["annotations"] = {"io.containerd.image.name": name,
                            "org.opencontainers.image.ref.name": name.rpartition(":")[2]}
    entry["platform"] = {"architecture": architecture, "os": "linux"}
    index = _json({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
                   "manifests": [entry]})
    with tarfile.open(path, "w") as archive:
        _add(archive, "oci-layout", _json({"imageLayoutVersion": "1.0.0"}))
        _add(archive, "index.json", index)
        for blob in (layer, image, manifest):
            _add(archive, "blobs/sha256/" + hashlib.sha256(blob).hexdigest(), blob)
    return path


def busybox():
    """The path of a statically linked busybox. :raises FileNotFoundError: says what to install."""
    path = shutil.which("busybox")
    if path is None:
        raise FileNotFoundError("there is no busybox: apt-get install busybox-static")
    return path


def _layer(files):
    program = busybox()
    applets = subprocess.run([program, "--list"], check=True, capture_output=True, text=True).stdout.split()
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as layer:
        for name in _DIRECTORIES:
            entry = tarfile.TarInfo(name)
            entry.type = tarfile.DIRTYPE
            entry.mode = 0o1777 if name.endswith("tmp") else 0o755
            layer.addfile(entry)
        with open(program, "rb") as file:
            _add(layer, "bin/busybox", file.read(), 0o755)
        for applet in applets:
            if applet != "busybox":
                entry = tarfile.TarInfo("bin/" + applet)
                entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
                layer.addfile(entry)
        for name, content in files.items():
            _add(layer, name, content, 0o755 if name.startswith("bin/") else 0o644)
    return stream.getvalue()


def _add(archive, name, content, mode=0o644):
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), mode
    archive.addfile(entry, io.BytesIO(content))


def _json(value):
    return json.dumps(value, separators=(",", ":")).encode()


def _digest(blob):
    return "sha256:" + hashlib.sha256(blob).hexdigest()


def _descriptor(media_type, blob):
    return {"mediaType": media_type, "digest": _digest(blob), "size": len(blob)}
