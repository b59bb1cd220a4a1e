"""The tables that go into the guest image."""

import runpy

from katashim.guest import tables
from katashim.ttrpc import proto


def test_the_generated_module_holds_the_same_tables(tmp_path):
    (tmp_path / "messages.py").write_text(tables.source())
    module = runpy.run_path(str(tmp_path / "messages.py"))
    assert (module["MESSAGES"], module["SERVICES"]) == tables.load()


def test_every_rpc_has_its_types():
    _, services = tables.load()
    for service in tables.SERVICES:
        known = {name: (method.request.DESCRIPTOR.full_name, method.response.DESCRIPTOR.full_name)
                 for name, method in proto.service(service).items()}
        assert services[service] == known
