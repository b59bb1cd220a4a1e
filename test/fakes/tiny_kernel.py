"""A kernel of some fifty bytes, for tests that need a guest that runs but not Linux.

An ELF file with a PVH entry point (Xen's docs/misc/pvh.pandoc; the way QEMU starts an uncompressed
Linux), entered in 32-bit protected mode. It prints a text on the first serial port and then halts,
resets the machine, or prints for ever. QEMU runs it some 50 ms after its launch.
"""

import struct

_LOAD_AT = 0x100000
_OFFSET = 0x1000
_PHYS32_ENTRY = 18              # XEN_ELFNOTE_PHYS32_ENTRY

_HALT = bytes.fromhex("fa f4 eb fc")                        # cli; 1: hlt; jmp 1b
_RESET = bytes.fromhex("6a 00 6a 00 0f 01 1c 24 cc")        # push 0; push 0; lidt [esp]; int3: triple fault
_ENDINGS = {"halt": _HALT, "reset": _RESET, "flood": b""}


def build(text, ending="halt"):
    """The ELF file's bytes.

    :param text: what it prints. :param ending: "halt", "reset", or "flood" (prints for ever).
    """
    code = _code(text.encode() + b"\0", ending)
    note = struct.pack("<III4sI", 4, 4, _PHYS32_ENTRY, b"Xen\0", _LOAD_AT)
    note_at = _OFFSET + len(code)
    header = struct.pack("<4s5B7xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 0, 0, 2, 62, 1, _LOAD_AT, 64, 0, 0,
                         64, 56, 2, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 7, _OFFSET, _LOAD_AT, _LOAD_AT, len(code), len(code) + 4096, 4096)
    notes = struct.pack("<IIQQQQQQ", 4, 4, note_at, 0, 0, len(note), len(note), 4)
    return (header + load + notes).ljust(_OFFSET, b"\0") + code + note


def _code(text, ending):
    prologue_size = 15
    end = _ENDINGS[ending]
    back = -(prologue_size + 9)                             # to the very start, over the printing
    if ending == "flood":
        end = b"\xe9" + struct.pack("<i", back - 5)         # jmp start
    start = struct.pack("<BI", 0xBC, _LOAD_AT + 0x8000)     # mov esp, a page above
    start += struct.pack("<BI", 0xBE, _LOAD_AT + prologue_size + 9 + len(end))      # mov esi, text
    start += struct.pack("<BI", 0xBA, 0x3F8)                # mov edx, COM1
    printing = bytes.fromhex("ac 84 c0 74 03 ee eb f8 90")  # 1: lodsb; test al,al; jz 2f; out dx,al; jmp 1b; nop
    assert len(start) == prologue_size and len(printing) == 9
    return start + printing + end + text
