"""Two Ray nodes on one machine: prefill on the one, decode on the other, KV over TCP between two stores."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import httpx
import pytest
import pytest_asyncio
from typer.testing import CliRunner

from halfmoon.client import Client
from halfmoon.deploy.certificates import init
from halfmoon.deploy.cli import app
from halfmoon.deploy.cluster import running_cluster
from halfmoon.deploy.ray_session import RayNode
from halfmoon.protocol.channel import open_channel
from halfmoon.protocol.config import ClusterConfig, DecodeConfig, ModelOptions, PrefillConfig, ProxyConfig, SecurityConfig, StoreConfig
from halfmoon.protocol.credentials import Credentials
from halfmoon.protocol.tls import Tls
from halfmoon.protocol.v1 import control_pb2
from halfmoon.proxy.tenants.keys_file import KeysFile
from halfmoon.tests.deploy.steady_load import steady_load
from halfmoon.tests.deploy.tls_listeners import listeners_of
from halfmoon.tests.waiting import until

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]

NUM_TOKENS = 64
NUM_TOKENS_EACH_OF_MANY = 24


PLAIN, WITH_TLS = "2P2D", "1P1D with TLS"
both = pytest.mark.parametrize("cluster", [PLAIN, WITH_TLS], indirect=True)
plain = pytest.mark.parametrize("cluster", [PLAIN], indirect=True)
with_tls = pytest.mark.parametrize("cluster", [WITH_TLS], indirect=True)


@pytest_asyncio.fixture(scope="module")
async def cluster(
    request: pytest.FixtureRequest,
    two_nodes: list[RayNode],
    model_folder: Path,
    cluster_type: type,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[object]:
    """2P2D: pairs are taken in turn, prefill-0 with decode-0, prefill-1 with decode-1, each on two nodes. With TLS: 1P1D and API keys."""
    has_tls = request.param == WITH_TLS
    num_each = 1 if has_tls else 2
    certs = tmp_path_factory.mktemp("tls") / "certs"
    credentials, front, security, key = Credentials.make(), {}, SecurityConfig(), ""
    if has_tls:
        init(certs, [], 1)
        credentials = Credentials(credentials.token, Tls.of_members(certs))
        keys, key = KeysFile({}, {}).with_key("acme", {})
        keys.save(certs / "keys.json")
        front = {"tls_certificate": str(certs / "front.pem"), "tls_key": str(certs / "front.key"), "keys_file": str(certs / "keys.json")}
        security = SecurityConfig(certs=str(certs))
    config = ClusterConfig(
        model=ModelOptions(path=str(model_folder), name="demo"),
        store=StoreConfig(arena_bytes=256 * 2**20),
        proxy=ProxyConfig(http_port=0, grpc_port=0, control_port=0, metrics_port=0, policy="round_robin", **front),
        prefill=PrefillConfig(num_workers=num_each, max_tokens_per_step=512),
        decode=DecodeConfig(num_workers=num_each),
        security=security,
    )
    async with running_cluster(config, two_nodes, credentials=credentials) as supervisor:
        async with cluster_type.open(supervisor, security.certs, key) as opened:
            yield opened


@both
async def test_tokens_between_nodes_equal_those_of_transformers(cluster, reference, prompt_of) -> None:
    pairs = set()
    for prompt_len in (1, 64, 65, 700, 1500):
        prompt = prompt_of(prompt_len)
        result = await cluster.client.generate(token_ids=list(prompt), max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
        assert list(result.token_ids) == reference.generate(prompt, NUM_TOKENS, result.token_ids)
        pairs.add((result.phases.prefill_worker, result.phases.decode_worker, result.phases.transport))
    if cluster.certs:
        assert pairs == {("prefill-0", "decode-0", "tcp")}
    else:
        assert pairs == {("prefill-0", "decode-0", "tcp"), ("prefill-1", "decode-1", "tcp")}, "either node to the other"
    await cluster.at_rest()


@plain
async def test_32_concurrent_streams_between_nodes_give_the_same_tokens(cluster, reference, prompt_of) -> None:
    prompts = [prompt_of(20 + 7 * i, seed=1) for i in range(32)]
    answers = await asyncio.gather(*(cluster.greedy(prompt, NUM_TOKENS_EACH_OF_MANY) for prompt in prompts))
    assert answers == [reference.generate(prompt, NUM_TOKENS_EACH_OF_MANY, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    await cluster.at_rest()


@plain
async def test_the_second_turn_finds_its_prefix_across_nodes(cluster, reference, prompt_of) -> None:
    first = prompt_of(200, seed=2)
    answer = await cluster.greedy(first, NUM_TOKENS)
    await cluster.at_rest()  # the answer's end does not wait long for its blocks to be cached
    second = (*first, *answer, *prompt_of(30, seed=3))
    result = await cluster.client.generate(token_ids=list(second), max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    assert list(result.token_ids) == reference.generate(second, NUM_TOKENS, result.token_ids)
    assert result.usage.num_cached_tokens >= 128


@with_tls
async def test_a_cluster_with_tls_speaks_to_nobody_in_the_clear(cluster) -> None:
    """At the clients' ports with the authority's certificate alone, at members' with a member's own."""
    supervisor, authority = cluster.supervisor, str(Path(cluster.certs, "authority.pem"))
    context = ssl.create_default_context(cafile=authority)
    async with httpx.AsyncClient(verify=context) as http:
        assert (await http.get(f"https://{supervisor.http_address}/ready")).json()["ready"]
        with pytest.raises(httpx.HTTPError):
            await http.get(f"http://{supervisor.http_address}/ready")
    client = Client(supervisor.grpc_address, api_key=cluster.api_key, authority=Path(authority).read_bytes(), control=cluster.control)
    assert (await asyncio.to_thread(client.status)).model == (await asyncio.to_thread(client.models))[0].id == "demo"
    client.close()
    clear = dataclasses.replace(supervisor.credentials, tls=None)
    members = [member.info.address for member in (await cluster.status()).members]
    assert len(members) == 4
    for address in (supervisor.control_address, supervisor.grpc_address, *members):
        async with open_channel(address, clear) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/halfmoon.v1.Control/Status")(b"", timeout=60)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE, address


@with_tls
async def test_a_local_process_without_credentials_is_no_member_and_no_client_of_a_cluster_with_tls_and_keys(cluster) -> None:
    """The authority's certificate is no secret: it knows it, and has none of its own."""
    found = await cluster.attacked(authority=Path(cluster.certs, "authority.pem").read_text(), asks_for_keys=True)
    assert found.pop("move KV by a data connection") == ["CLOSED"]
    assert (found.pop("time a prefix"), found.pop("time a prefix by HTTP")) == (["UNAUTHENTICATED"], ["401"])
    assert found.pop("cancel another's request") == ["UNAUTHENTICATED"]
    assert {found.pop(name)[0] for name in ("drain at the clients' port", "join at the clients' port")} == {"UNIMPLEMENTED"}
    assert len(found) == 20 and set(map(tuple, found.values())) == {("UNAVAILABLE",)}, found


@with_tls
async def test_certificates_and_their_authority_change_under_load(
    cluster, reference, prompt_of, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`halfmoon certs rotate`, then another authority: trust both, show the new one's, trust it alone. Then processes start anew.

    Each step is taken as documented: the next one when the log says that all members have it.
    """
    certs, other = Path(cluster.certs), tmp_path / "other"
    init(other, [], 1)
    ours, theirs = (folder / "authority.pem" for folder in (certs, other))
    both, old = ours.read_bytes() + theirs.read_bytes(), Tls.of_members(certs)
    prompts = [prompt_of(length, seed=8) for length in (70, 200)]
    answers = {
        prompt: await cluster.client.generate(token_ids=list(prompt), max_tokens=32, temperature=0.0, ignore_eos=True) for prompt in prompts
    }
    assert [list(answers[prompt].token_ids) for prompt in prompts] == [
        reference.generate(prompt, 32, answers[prompt].token_ids) for prompt in prompts
    ]
    listeners, before = await listeners_of(cluster), await cluster.status()
    caplog.set_level(logging.INFO, "halfmoon.deploy.renewal")

    async def taken(number: int) -> None:
        await until(lambda: caplog.text.count("5 members show new certificates") == number)
        for listener in listeners:
            wanted = (certs / ("front.pem" if listener.is_front else "member.pem")).read_text()
            async with asyncio.timeout(60):  # a front looks at its files for itself
                while await asyncio.to_thread(listener.shown, both) != wanted:
                    assert listener.is_front, f"{listener.what} shows its old certificate"
                    await asyncio.sleep(0.1)

    async with steady_load(cluster, both, answers) as load:
        await load.more(4)
        assert CliRunner().invoke(app, ["certs", "rotate", str(certs)]).exit_code == 0
        await taken(1)
        await load.more(8)
        put(certs / "authority.pem", both)
        await taken(2)
        await load.more(8)
        for file in ("front.key", "front.pem", "member.key", "member.pem"):
            put(certs / file, (other / file).read_bytes())
        await taken(3)
        assert all([await asyncio.to_thread(listener.takes, old) for listener in listeners if listener.is_mutual]), "both are trusted"
        await load.more(8)
        put(certs / "authority.pem", theirs.read_bytes())
        await taken(4)
        for listener in listeners:
            with pytest.raises(ssl.SSLCertVerificationError):
                await asyncio.to_thread(listener.shown, old.authority)
            if listener.is_mutual:
                assert not await asyncio.to_thread(listener.takes, old), f"{listener.what} takes a certificate of the old authority"
                assert await asyncio.to_thread(listener.takes, Tls.of_members(certs)), listener.what
        await load.more(8)
    after = await cluster.status()
    assert [member.info for member in after.members] == [member.info for member in before.members], "nobody left and came back"
    for killed in ("decode-0", *(member.info.id for member in after.members if member.info.role == control_pb2.ROLE_STORE)):
        await cluster.kill(killed)
    await cluster.restart_proxy(4)
    async with steady_load(cluster, theirs.read_bytes(), answers) as load:
        await load.more(4)
        anew = await load.client.generate(token_ids=list(prompt_of(300, seed=8)), max_tokens=4)
        assert anew.phases.transport == "tcp", "by data connections that were opened under the new authority alone"
    await cluster.at_rest()


def put(path: Path, content: bytes) -> None:
    """Whoever reads it meanwhile gets the old or the new one."""
    new = path.with_suffix(".new")
    new.write_bytes(content)
    new.replace(path)
