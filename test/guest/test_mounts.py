"""Mount options in words."""

import pytest

from katashim.guest.agent import linux, mounts
from katashim.guest.agent.rpcerror import RpcError


def test_words_become_flags_and_the_rest_is_the_filesystems():
    options = mounts.Options(["ro", "nodev", "size=1m", "mode=1777", "rslave"])
    assert options.flags == linux.MS_RDONLY | linux.MS_NODEV
    assert options.data == "size=1m,mode=1777"
    assert options.propagation == [linux.MS_SLAVE | linux.MS_REC]


def test_a_later_word_takes_an_earlier_one_back():
    assert mounts.Options(["ro", "nosuid", "rw"]).flags == linux.MS_NOSUID


def test_loop_and_too_much_are_refused():
    with pytest.raises(RpcError, match="loop"):
        mounts.Options(["loop"])
    with pytest.raises(RpcError, match="5000"):
        mounts.Options(["x" * 5000])


def test_the_table_undoes_the_kernels_escapes():
    assert mounts._unescape(r"/a\040b\134c") == r"/a b\c"


def test_the_root_is_in_the_table():
    assert "/" in {mount_point for mount_point, _ in mounts.table()}
    assert mounts.type_at("/proc") == "proc"
