"""The agent's message tables, made from the descriptor set of katashim.ttrpc.proto.

The descriptor set is itself a protobuf message, so wire.py reads it: building the guest image needs
no google.protobuf. Only what the agent's services and the ttRPC envelope reach is put into the
tables. Called by rootfs.py, and by the agent when it runs out of the source tree (tests).
"""

import os

from katashim.guest import wire

DESCRIPTORS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
                           "ttrpc", "proto", "descriptors.binpb")
SERVICES = ("grpc.AgentService", "grpc.Health")
ENVELOPE = ("ttrpc.Request", "ttrpc.Response")

# Of google/protobuf/descriptor.proto, as far as we look into it.
_DESCRIPTOR_TABLES = {
    "FileDescriptorSet": ((1, "file", "message", True, "File"),),
    "File": ((2, "package", "string", False, None), (4, "message_type", "message", True, "Type"),
             (6, "service", "message", True, "Service")),
    "Type": ((1, "name", "string", False, None), (2, "field", "message", True, "Field"),
             (3, "nested_type", "message", True, "Type"), (7, "options", "message", False, "TypeOptions")),
    "TypeOptions": ((7, "map_entry", "bool", False, None),),
    "Field": ((1, "name", "string", False, None), (3, "number", "int32", False, None),
              (4, "label", "enum", False, None), (5, "type", "enum", False, None),
              (6, "type_name", "string", False, None), (9, "oneof_index", "int32", False, "optional")),
    "Service": ((1, "name", "string", False, None), (2, "method", "message", True, "Method")),
    "Method": ((1, "name", "string", False, None), (2, "input_type", "string", False, None),
               (3, "output_type", "string", False, None)),
}
_KINDS = {3: "int64", 4: "uint64", 5: "int32", 8: "bool", 9: "string", 11: "message", 12: "bytes",
          13: "uint32", 14: "enum"}
_REPEATED = 3


def load(path=DESCRIPTORS):
    """``(tables for wire.Codec, {service: {method: (request type, response type)}})``."""
    codec = wire.Codec(_DESCRIPTOR_TABLES)
    with open(path, "rb") as file:
        files = codec.decode(codec.type("FileDescriptorSet"), file.read()).file
    types, services = {}, {}
    for descriptor in files:
        _collect(types, descriptor.package, descriptor.message_type)
        for service in descriptor.service:
            services[_join(descriptor.package, service.name)] = {
                method.name: (method.input_type[1:], method.output_type[1:]) for method in service.method}
    services = {name: services[name] for name in SERVICES}
    wanted = [*ENVELOPE, *(name for methods in services.values() for pair in methods.values()
                           for name in pair)]
    tables = {}
    while wanted:
        name = wanted.pop()
        if name not in tables:
            tables[name] = tuple(_row(field, types) for field in sorted(types[name].field, key=_number))
            wanted.extend(_mentioned(tables[name]))
    return dict(sorted(tables.items())), services


def source():
    """The tables as a Python module, for the guest."""
    tables, services = load()
    lines = ['"""The agent\'s messages and services, made by katashim.guest.tables."""', "", "MESSAGES = {"]
    for name, rows in tables.items():
        lines.append(f"    {name!r}: {rows!r},")
    return "\n".join([*lines, "}", f"SERVICES = {services!r}", ""])


def _number(field):
    return field.number


def _join(package, name):
    return f"{package}.{name}" if package else name


def _collect(types, prefix, descriptors):
    for descriptor in descriptors:
        name = _join(prefix, descriptor.name)
        types[name] = descriptor
        _collect(types, name, descriptor.nested_type)


def _row(field, types):
    kind = _KINDS[field.type]       # a KeyError here: wire.py must learn another kind first
    detail = None
    repeated = field.label == _REPEATED
    if kind == "message":
        detail = field.type_name[1:]
        options = types[detail].options
        if options is not None and options.map_entry:
            columns = (_row(column, types) for column in sorted(types[detail].field, key=_number))
            return field.number, field.name, "map", False, tuple((column[2], column[4]) for column in columns)
    elif field.oneof_index is not None:
        detail = "optional"
    return field.number, field.name, kind, repeated, detail


def _mentioned(rows):
    for _, _, kind, _, detail in rows:
        if kind == "message":
            yield detail
        elif kind == "map" and detail[1][0] == "message":
            yield detail[1][1]
