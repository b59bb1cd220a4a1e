"""Compile this directory's ``.proto`` files into ``descriptors.binpb`` (``make proto``).

The result is one serialized ``FileDescriptorSet``, dependencies first, that
:mod:`katashim.ttrpc.proto` loads. It is committed, so only someone who changes a ``.proto`` needs
the compiler (``grpcio-tools``, in ``requirements-dev.txt``); a test checks that both agree.

Generated Python code is not used, because it runs only on a protobuf at least as new as the
compiler that wrote it, while a descriptor set loads into every version.

    python katashim/ttrpc/proto/compile.py            # write descriptors.binpb
    python katashim/ttrpc/proto/compile.py --check    # exit 1 when it is out of date
"""

import os
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
BLOB = os.path.join(HERE, "descriptors.binpb")

# Task version 3 is version 2 under another package name: one text serves both.
TASK_V2 = "containerd_task.proto"
TASK_V3 = "containerd_task_v3.proto"
PACKAGE_V2, PACKAGE_V3 = "package containerd.task.v2;", "package containerd.task.v3;"


def compile_protos():
    """Run the compiler over every ``.proto`` here; returns the set's bytes.

    :raises RuntimeError: the compiler refused a file; its own words are on stderr.
    """
    from google.protobuf import descriptor_pb2
    from grpc_tools import protoc

    well_known = os.path.join(os.path.dirname(protoc.__file__), "_proto")
    names = sorted(name for name in os.listdir(HERE) if name.endswith(".proto"))
    with tempfile.TemporaryDirectory() as scratch:
        with open(os.path.join(HERE, TASK_V2)) as source:
            text = source.read()
        with open(os.path.join(scratch, TASK_V3), "w") as target:
            target.write(_replace_once(text, PACKAGE_V2, PACKAGE_V3))
        output = os.path.join(scratch, "set")
        status = protoc.main(["protoc", f"-I{HERE}", f"-I{scratch}", f"-I{well_known}", "--include_imports",
                              f"--descriptor_set_out={output}", *names, TASK_V3])
        if status != 0:
            raise RuntimeError(f"protoc exited with {status}")
        with open(output, "rb") as compiled:
            files = descriptor_pb2.FileDescriptorSet.FromString(compiled.read())
    for file in files.file:
        _strip_json_names(file)
    return files.SerializeToString(deterministic=True)


def _replace_once(text, old, new):
    if text.count(old) != 1:
        raise RuntimeError(f"{TASK_V2} should have exactly one line {old!r}")
    return text.replace(old, new)


def _strip_json_names(container):
    """Forget the derived camelCase names: every reader derives them again, and nobody here uses them."""
    messages = container.message_type if hasattr(container, "message_type") else container.nested_type
    for message in messages:
        for field in message.field:
            field.ClearField("json_name")
        _strip_json_names(message)


def main(arguments):
    compiled = compile_protos()
    if "--check" in arguments:
        with open(BLOB, "rb") as committed:
            if committed.read() != compiled:
                print("descriptors.binpb does not match the .proto files: run `make proto`", file=sys.stderr)
                return 1
        return 0
    with open(BLOB, "wb") as target:
        target.write(compiled)
    print(f"{BLOB}: {len(compiled)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
