from agent.commands.check_host import guard
from agent.commands.findings import Mark
from agent.config import Config, Core
from tests.contract.inside import inside
from tests.support.netns import Network


def test_check_names_a_flowtable_over_the_interface() -> None:
    config = Config(core=Core(url="http://127.0.0.1:1/"))
    with Network() as network:
        space = network.namespace("gateway")
        space.ip("link", "add", "wg0", "type", "veth", "peer", "name", "there")
        assert [finding.mark for finding in inside(space, guard(config))] == [Mark.OK]
        flowtable = "table inet shop { flowtable fast { hook ingress priority 0; devices = { wg0 }; }; }"
        space.run("nft", "-f", "-", stdin=flowtable)

        [_, warning] = inside(space, guard(config))

    assert warning.mark is Mark.WARNING
    assert "inet shop fast" in warning.message
    assert "take wg0 out" in warning.remedy
