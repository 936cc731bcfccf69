import asyncio
from pathlib import Path

import pytest
import trustme

from agent.errors import CoreUnavailable
from agent.sandbox.client import CoreClient
from agent.sandbox.service import CoreService, make_config
from tests.sandbox.parts import run


def test_over_tls_the_core_serves_those_who_trust_its_ca(tmp_path: Path) -> None:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    issued = ca.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    settings = make_config(
        tmp_path, tls_cert_file=str(tmp_path / "cert.pem"), tls_key_file=str(tmp_path / "key.pem")
    )

    async def main() -> None:
        service = CoreService(settings, ca_file=str(tmp_path / "ca.pem"))
        await service.start()
        try:
            assert service.url.startswith("https://127.0.0.1:")
            assert await service.admin.locations() == []
            with CoreClient(service.url) as client, pytest.raises(CoreUnavailable):
                await asyncio.to_thread(client.start, "alice", bytes(32), "totp")
        finally:
            await service.close()

    run(main())
