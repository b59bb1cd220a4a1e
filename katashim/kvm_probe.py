"""Measure how fast KVM runs kernel-mode code. A program of its own, started by katashim.host.

A device /dev/kvm that opens proves little: some hosts (kvm_pvm, for one) run a guest's user code
natively and emulate its kernel code, a thousand times slower, and Linux never finishes booting
there. So this makes a VM with one vCPU in 64-bit mode, ring 0, as a guest kernel would run, and
times a counting loop. It is a process of its own so that whatever goes wrong in KVM ends here.

Prints one JSON object: ``{"loops_per_s": 1900000}`` or ``{"error": "KVM_CREATE_VM: ..."}``.
Interface: Documentation/virt/kvm/api.rst of Linux. Needs nothing of katashim (run with ``-IS``).
"""

import ctypes
import fcntl
import json
import mmap
import os
import struct
import time

KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01
KVM_CHECK_EXTENSION = 0xAE03
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_CREATE_VCPU = 0xAE41
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_RUN = 0xAE80
KVM_SET_REGS = 0x4090AE82
KVM_GET_SREGS = 0x8138AE83
KVM_SET_SREGS = 0x4138AE84

API_VERSION = 12
EXIT_HLT = 5
# What QEMU and the other VMMs cannot do without: KVM_CAP_* numbers of linux/kvm.h.
CAPABILITIES = {"IRQCHIP": 0, "USER_MEMORY": 3, "SET_TSS_ADDR": 4, "IRQFD": 32, "IOEVENTFD": 36,
                "IMMEDIATE_EXIT": 136}

MEMORY_BYTES = 0x10000
CODE, PML4, PDPT, PD = 0x1000, 0x2000, 0x3000, 0x4000
# A short loop first: 5 ms where kernel mode is emulated, and that answers it. Elsewhere it is shorter
# than entering and leaving the guest (0.1 ms under a nested hypervisor), and a long one must tell.
SHORT, LONG = 5_000, 1_000_000
EMULATED_S = 0.002
ROUNDS = 3                      # the first one pays for page faults and, under an emulator, translation


class ProbeError(Exception):
    """A step failed; the text names it."""


def call(step, fd, request, argument=0):
    """An ioctl whose error names the step."""
    try:
        return fcntl.ioctl(fd, request, argument)
    except OSError as exc:
        raise ProbeError(f"{step}: {exc.strerror}") from exc


def measure():
    """Loops per second of `dec; jnz` in ring 0."""
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    check_interface(kvm)
    vm = call("KVM_CREATE_VM", kvm, KVM_CREATE_VM)
    memory = mmap.mmap(-1, MEMORY_BYTES)
    fill(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    call("KVM_SET_USER_MEMORY_REGION", vm, KVM_SET_USER_MEMORY_REGION,
         struct.pack("=IIQQQ", 0, 0, 0, MEMORY_BYTES, address))
    vcpu = call("KVM_CREATE_VCPU", vm, KVM_CREATE_VCPU)
    shared = mmap.mmap(vcpu, call("KVM_GET_VCPU_MMAP_SIZE", kvm, KVM_GET_VCPU_MMAP_SIZE))
    enter_long_mode(vcpu)
    spent = min(run_once(vcpu, shared, SHORT) for _ in range(ROUNDS))
    if spent > EMULATED_S:
        return int(SHORT / spent)
    return int(LONG / min(run_once(vcpu, shared, LONG) for _ in range(ROUNDS)))


def check_interface(kvm):
    """The API version and the capabilities that a VMM needs."""
    version = call("KVM_GET_API_VERSION", kvm, KVM_GET_API_VERSION)
    if version != API_VERSION:
        raise ProbeError(f"KVM has API version {version}, not {API_VERSION}")
    missing = [name for name, number in CAPABILITIES.items()
               if call("KVM_CHECK_EXTENSION", kvm, KVM_CHECK_EXTENSION, number) <= 0]
    if missing:
        raise ProbeError(f"KVM lacks {', '.join('KVM_CAP_' + name for name in missing)}")


def fill(memory):
    """The loop, and page tables that map the first 2 MiB one to one."""
    loop = b"\xff\xc9\x75\xfc\xf4"               # 1: dec ecx; jnz 1b; hlt
    memory[CODE:CODE + len(loop)] = loop
    for table, entry in ((PML4, PDPT | 3), (PDPT, PD | 3), (PD, 0x83)):
        memory[table:table + 8] = struct.pack("<Q", entry)


def enter_long_mode(vcpu):
    """64-bit mode, ring 0, paging on: the state a kernel runs in (struct kvm_sregs)."""
    state = bytearray(312)
    call("KVM_GET_SREGS", vcpu, KVM_GET_SREGS, state)
    data = segment(selector=16, kind=3, long=0)
    for index in range(1, 6):                   # ds, es, fs, gs, ss
        state[24 * index:24 * index + 24] = data
    state[0:24] = segment(selector=8, kind=11, long=1)
    cr0_pe_mp_et_ne_wp_pg, cr4_pae, efer_lme_lma = 0x80010033, 0x20, 0x500
    struct.pack_into("<Q", state, 224, cr0_pe_mp_et_ne_wp_pg)
    struct.pack_into("<QQ", state, 240, PML4, cr4_pae)
    struct.pack_into("<Q", state, 264, efer_lme_lma)
    call("KVM_SET_SREGS", vcpu, KVM_SET_SREGS, bytes(state))


def segment(selector, kind, long):
    """A flat segment (struct kvm_segment)."""
    return struct.pack("<QIH10B", 0, 0xFFFFFFFF, selector, kind, 1, 0, 1 - long, 1, long, 1, 0, 0, 0)


def run_once(vcpu, shared, loops):
    """Run the loop from its start to its HLT; returns seconds."""
    registers = [0, 0, loops, *[0] * 13, CODE, 2]       # rax, rbx, rcx, ..., rip, rflags (struct kvm_regs)
    call("KVM_SET_REGS", vcpu, KVM_SET_REGS, struct.pack("<18Q", *registers))
    begun = time.perf_counter()
    call("KVM_RUN", vcpu, KVM_RUN)
    spent = time.perf_counter() - begun
    reason = struct.unpack_from("<I", shared, 8)[0]
    if reason != EXIT_HLT:
        raise ProbeError(f"the vCPU left its loop with exit reason {reason}, not HLT")
    return spent


def main():
    try:
        answer = {"loops_per_s": measure()}
    except (ProbeError, OSError) as exc:
        answer = {"error": str(exc)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
