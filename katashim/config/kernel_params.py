"""The guest's kernel command line as words: splitting, merging, and the agent's own words.

Splitting follows the kernel's next_arg() (lib/cmdline.c): spaces separate, double quotes protect
them and stay where they are, as in ``dm-mod.create="dm-verity,,,ro,0 736328 verity ..."``.
"""

from katashim.config.table import SECTIONS
from katashim.errors import InvalidArgument

# What agent settings become: {setting: (kernel parameter, divisor of the number)}. A flag becomes a word.
_AGENT_NUMBERS = {
    "container_pipe_size": ("agent.container_pipe_size", 1),
    "launch_process_timeout": ("agent.launch_process_timeout", 1),
    "cdh_api_timeout_ms": ("agent.cdh_api_timeout", 1000),
}
_AGENT_FLAGS = {
    "enable_debug": "agent.log=debug",
    "enable_tracing": "agent.trace=true",
    "debug_console_enabled": "agent.debug_console agent.debug_console_vport=1026",
    "visible_cdi_devices": "agent.visible_cdi_devices=true",
}


def split_params(text):
    """The words of a kernel command line.

    :returns: list of str, quotes kept.
    :raises InvalidArgument: a quote is not closed.
    """
    words, word, quoted = [], "", False
    for char in text:
        if char == '"':
            quoted = not quoted
        if char.isspace() and not quoted:
            if word:
                words.append(word)
            word = ""
        else:
            word += char
    if quoted:
        raise InvalidArgument(f"a quote is not closed in the kernel parameters: {text}")
    return words + [word] if word else words


def merge_params(*texts):
    """Command lines laid over each other: a word replaces the earlier words of its name, in their place.

    Words of one text never replace each other: ``console=ttyS0 console=hvc0`` means both.
    """
    merged = []
    for text in texts:
        words = split_params(text)
        names = {_name(word) for word in words}
        kept = []
        for word in merged:
            if _name(word) not in names:
                kept.append(word)
            else:                               # the first of the old name makes room for all the new
                kept += [new for new in words if _name(new) == _name(word)]
                words = [new for new in words if _name(new) != _name(word)]
        merged = kept + words
    return " ".join(merged)


def agent_params(agent):
    """The words that tell the guest's agent its settings; only those that differ from its defaults.

    :param agent: an Agent record.
    """
    keys = SECTIONS["agent"]
    words = [word for name, word in _AGENT_FLAGS.items() if getattr(agent, name)]
    for name, (parameter, divisor) in _AGENT_NUMBERS.items():
        value = getattr(agent, name)
        if value != keys[name].default:
            words.append(f"{parameter}={value // divisor}")
    if agent.mem_agent.mem_agent_enable:
        words += ["psi=1", "agent.mem_agent_enable=1", *_mem_agent_params(agent.mem_agent)]
    return " ".join(words)


def _mem_agent_params(mem_agent):
    """``agent.mem_agent_*`` of every changed setting, sorted, as Kata sends them."""
    for name, key in sorted(SECTIONS["agent.mem_agent"].items()):
        value = getattr(mem_agent, name)
        if name != "mem_agent_enable" and value != key.default:
            yield f"agent.mem_agent_{name}={int(value)}"


def _name(word):
    return word.partition("=")[0]
