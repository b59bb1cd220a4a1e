import tomllib

import configobj
from hypothesis import given
from hypothesis import strategies as st

from katashim.config.lines import conf_lines, toml_lines

TOML = '''\
# a comment with [brackets] and a = b
title = "x"

[hypervisor.qemu]
kernel = "/k" # = not a key
kernel_params = """
fake = 1
[not.a.section]
"""
image = '/i'
list = [
  "a # ]", # ]
  "b = 1",
  [1, 2],
]
after = 1
lit = \'\'\'one
inner = 2\'\'\'
inline = { a = 1, b = "]" }
quoted."x.y" = 3
[ hypervisor . "clh" ]
path = "\\"]["

[[hypervisor.qemu.guest_extension_images]]
name = "one"
[[hypervisor.qemu.guest_extension_images]]
name = "two"
[runtime]
last=true'''


def test_toml():
    assert tomllib.loads(TOML)                      # what is indexed here is what tomllib accepts
    q = ("hypervisor", "qemu")
    assert toml_lines(TOML) == {
        ("title",): 2, q: 4, (*q, "kernel"): 5, (*q, "kernel_params"): 6, (*q, "image"): 10, (*q, "list"): 11,
        (*q, "after"): 16, (*q, "lit"): 17, (*q, "inline"): 19, (*q, "quoted", "x.y"): 20,
        ("hypervisor", "clh"): 21, ("hypervisor", "clh", "path"): 22,
        (*q, "guest_extension_images"): 24, (*q, "guest_extension_images", "name"): 25,
        ("runtime",): 28, ("runtime", "last"): 29}


CONF = '''\
# comment = no
top = 1
[hypervisor]
[[qemu]]   # a comment
kernel = /k
kernel_params = """one
fake = 1
[no]
two"""
"quoted key" = 'x' # comment
short = """all here"""
[[[factory]]]
enable_template = true
[[clh]]
list = a, "b = c", d
[runtime]
name='x\''''


def test_conf():
    assert configobj.ConfigObj(CONF.split("\n"), interpolation=False)
    q = ("hypervisor", "qemu")
    assert conf_lines(CONF) == {
        ("top",): 2, ("hypervisor",): 3, q: 4, (*q, "kernel"): 5, (*q, "kernel_params"): 6,
        (*q, "quoted key"): 10, (*q, "short"): 11, (*q, "factory"): 12,
        (*q, "factory", "enable_template"): 13, ("hypervisor", "clh"): 14, ("hypervisor", "clh", "list"): 15,
        ("runtime",): 16, ("runtime", "name"): 17}


_WORDS = st.text("ab[]{}#=,.'\" \\", max_size=8)
_VALUES = st.one_of(
    st.integers(0, 9).map(str),
    _WORDS.map(lambda text: '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'),
    _WORDS.map(lambda text: "'" + text.replace("'", "") + "'"),
    st.lists(_WORDS.map(lambda text: "'" + text.replace("'", "") + "'")).map(
        lambda items: "[\n" + "".join(f" {item}, # ]\n" for item in items) + "]"),
    _WORDS.map(lambda text: '"""\n' + text.replace("\\", "").replace('"', "") + '\nkey0 = 1\n"""'))


@given(st.lists(st.tuples(st.booleans(), _VALUES), min_size=1, max_size=8))
def test_every_key_that_tomllib_sees_has_its_line(entries):
    """Keys are numbered, so each must be found once, on the line where it was written."""
    text, expected, section = "", {}, ()
    for index, (header, value) in enumerate(entries):
        if header:
            section = (f"s{index}",)
            expected[section] = text.count("\n") + 1
            text += f"[s{index}]\n"
        expected[*section, f"key{index + 1}"] = text.count("\n") + 1
        text += f"key{index + 1} = {value}\n"
    tomllib.loads(text)
    assert toml_lines(text) == expected
