"""Joining, renewing, revoking: a real coordinator with TLS, real certificates, real connections."""

from __future__ import annotations

import asyncio
import functools
import socket
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from fleetune.coordinator import rotation, tlsfolder
from fleetune.coordinator.faults import MachineError
from fleetune.coordinator.tokens import Limiter
from fleetune.v1 import control_pb2, registry_pb2_grpc
from fleetune.v1 import registry_pb2 as pb
from support.coordinating import WAIT_S
from support.secured import DEVICE, Secured, secured

CODE = grpc.StatusCode


async def refused(work: object, code: grpc.StatusCode) -> str:
    """The text of the refusal."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await work  # type: ignore[misc]
    assert caught.value.code() is code, caught.value.details()
    return caught.value.details() or ""


async def audit(fleet: Secured, action: str) -> list[control_pb2.AuditEntry]:
    reply = await fleet.coordinator.control.ListAudit(control_pb2.ListAuditRequest())
    return [entry for entry in reply.entries if entry.action == action]


async def test_a_token_gives_a_certificate_with_which_the_coordinator_answers(tmp_path: Path) -> None:
    async with secured(tmp_path) as fleet:
        pi = await fleet.join(await fleet.token(), "pi")
        assert (pi.facts.kind, pi.facts.name, pi.facts.role) == ("agent", "pi", "")
        assert 29 * 86_400 < pi.facts.not_after_unix_s - time.time() < 31 * 86_400
        assert await fleet.serves(pi) is CODE.OK
        (entry,) = [e for e in await audit(fleet, "join") if e.subject == "agent pi"]
        assert (entry.actor, entry.outcome) == ("127.0.0.1", "done")
        (device,) = (await fleet.coordinator.control.ListDevices(control_pb2.ListDevicesRequest())).devices
        assert (device.name, device.device_id, device.online, device.last_seen_unix_s) == ("pi", DEVICE, False, 0.0)
        assert device.certificate_until_unix_s == pi.facts.not_after_unix_s


async def test_the_role_of_an_operator_is_the_token_s(tmp_path: Path) -> None:
    async with secured(tmp_path) as fleet:
        grace = await fleet.join(await fleet.token(role=pb.ROLE_VIEW), "grace", "")
        assert (grace.facts.kind, grace.facts.role) == ("operator", "view")
        async with fleet.channel(grace) as opened:
            await refused(
                registry_pb2_grpc.RegistryServiceStub(opened).ListTokens(pb.ListTokensRequest()),
                CODE.PERMISSION_DENIED,
            )


async def test_exactly_as_many_join_at_once_as_the_token_has_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleetune.coordinator.rpc.join.Limiter", lambda: Limiter(per_source_s=1000.0, of_all_s=1000.0))
    monkeypatch.setattr("fleetune.coordinator.door.PER_SOURCE", 50)
    async with secured(tmp_path) as fleet:
        token = await fleet.token(7)

        async def one(number: int) -> str:
            try:
                await fleet.join(token, f"pi{number}", f"device-{number:04d}")
            except grpc.aio.AioRpcError as error:
                return error.code().name
            return "in"

        assert Counter(await asyncio.gather(*(one(n) for n in range(50)))) == {"in": 7, "UNAUTHENTICATED": 43}
        assert len((await fleet.coordinator.control.ListDevices(control_pb2.ListDevicesRequest())).devices) == 7


async def test_an_ungood_token_is_refused_with_one_text_whatever_is_wrong(tmp_path: Path) -> None:
    async with secured(tmp_path) as fleet:
        used = await fleet.token()
        await fleet.join(used, "pi")
        revoked = await fleet.token()
        await fleet.registry.RevokeToken(pb.RevokeTokenRequest(token_id=(await last_token(fleet)).token_id))
        texts = {await refused(fleet.join(token, "other", "device-0002"), CODE.UNAUTHENTICATED) for token in (used, revoked, "x" * 32)}
        assert len(texts) == 1


async def last_token(fleet: Secured) -> pb.TokenView:
    return (await fleet.registry.ListTokens(pb.ListTokensRequest())).tokens[-1]


async def test_a_name_that_is_taken_is_refused_and_costs_no_use(tmp_path: Path) -> None:
    async with secured(tmp_path) as fleet:
        pi = await fleet.join(await fleet.token(), "pi")
        token = await fleet.token()
        assert "'pi'" in await refused(fleet.join(token, "pi", "device-0002"), CODE.ALREADY_EXISTS)
        assert (await last_token(fleet)).uses_left == 1
        await fleet.join(token, "pi2", "device-0002")
        assert await fleet.serves(pi) is CODE.OK


async def test_a_wiped_board_takes_its_name_over_by_an_operator_s_word_and_the_old_certificate_ends(tmp_path: Path) -> None:
    async with secured(tmp_path) as fleet:
        old = await fleet.join(await fleet.token(), "pi")
        assert await fleet.serves(old) is CODE.OK
        token = await fleet.token(name="pi", replace=True)
        await refused(fleet.join(token, "another", "device-0002"), CODE.PERMISSION_DENIED)
        new = await fleet.join(token, "pi", "device-0002")
        assert await fleet.serves(old) is CODE.UNAUTHENTICATED
        assert await fleet.serves(new) is CODE.OK
        (device,) = (await fleet.coordinator.control.ListDevices(control_pb2.ListDevicesRequest())).devices
        assert (device.name, device.device_id, device.revoked) == ("pi", "device-0002", False)


async def test_a_join_whose_answer_was_lost_is_tried_again_without_another_use(tmp_path: Path) -> None:
    async with secured(tmp_path) as fleet:
        token = await fleet.token()
        lost = await fleet.join(token, "pi")
        again = await fleet.join(token, "pi")
        assert await fleet.serves(again) is CODE.OK
        assert await fleet.serves(lost) is CODE.UNAUTHENTICATED
        # Once its owner has come in, whoever comes with the token is somebody else.
        await refused(fleet.join(token, "pi"), CODE.UNAUTHENTICATED)
        assert await fleet.serves(again) is CODE.OK


async def test_another_device_cannot_pass_a_lost_answer_off_as_its_own(tmp_path: Path) -> None:
    async with secured(tmp_path) as fleet:
        token = await fleet.token()
        await fleet.join(token, "pi")
        await refused(fleet.join(token, "pi", "device-0002"), CODE.UNAUTHENTICATED)


async def test_too_many_tries_from_one_address_are_put_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Still(Limiter):
        """For which no time passes, so that no try earns another one."""

        def allows(self, source: str, now_s: float) -> bool:
            return super().allows(source, 0.0)

    monkeypatch.setattr("fleetune.coordinator.rpc.join.Limiter", lambda: Still(per_source_s=1.0))
    async with secured(tmp_path) as fleet:
        tries = await asyncio.gather(*(fleet.join("x" * 32, "pi") for _ in range(30)), return_exceptions=True)
        codes = Counter(error.code() for error in tries if isinstance(error, grpc.aio.AioRpcError))
        assert codes[CODE.RESOURCE_EXHAUSTED] >= 1
        assert codes[CODE.UNAUTHENTICATED] >= 1
        assert codes.total() == 30
        # Of 30 refusals the log and the audit log tell one of each kind; the number of the others follows after a minute.
        assert len([e for e in await audit(fleet, "join") if e.outcome == "refused"]) == 2
        assert len([r for r in caplog.records if r.name == "fleetune.gate" and "JoinService/Join" in r.getMessage()]) == 2


async def test_a_port_for_joining_that_is_taken_is_told_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(MachineError, match=f"the address {listen} cannot be listened on"):
            async with secured(tmp_path, join_listen=listen):
                pass
    async with secured(tmp_path) as fleet:
        assert await fleet.serves(fleet.admin) is CODE.OK


async def test_a_device_joins_at_once_in_front_of_hundreds_of_idle_connections(tmp_path: Path) -> None:
    async with secured(tmp_path) as fleet:
        token, port = await fleet.token(), fleet.coordinator.running.join_port

        def crowd() -> list[socket.socket]:
            return [socket.create_connection(("127.0.0.1", port), WAIT_S, (f"127.0.0.{2 + number % 9}", 0)) for number in range(400)]

        held = await asyncio.to_thread(crowd)
        try:
            pi = await asyncio.wait_for(fleet.join(token, "pi"), WAIT_S)
            assert await fleet.serves(pi) is CODE.OK
            assert (await audit(fleet, "join"))[-1].actor == "127.0.0.1"
        finally:
            for one in held:
                one.close()


async def test_the_number_of_further_refusals_is_in_the_audit_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleetune.coordinator.rpc.refusals.TELL_S", 0.3)
    # One kind of refusal alone, whichever machine this is.
    monkeypatch.setattr("fleetune.coordinator.rpc.join.Limiter", lambda: Limiter(per_source_s=1e6, of_all_s=1e6))
    async with secured(tmp_path) as fleet:
        told: list[str] = []
        while not told:
            await asyncio.gather(*(fleet.join("x" * 32, f"pi-{number}") for number in range(4)), return_exceptions=True)
            told = [entry.detail for entry in await audit(fleet, "join") if "another" in entry.detail]
        assert told[0].startswith("a token that is not good: another ")


async def test_renewal_gives_the_same_identity_and_the_old_certificate_stays_good(tmp_path: Path) -> None:
    async with secured(tmp_path) as fleet:
        pi = await fleet.join(await fleet.token(), "pi")
        new = await fleet.renew(pi)
        assert (new.facts.name, new.facts.kind) == ("pi", "agent")
        assert new.certificate != pi.certificate
        assert [await fleet.serves(who) for who in (pi, new)] == [CODE.OK, CODE.OK]


async def test_a_device_that_renews_in_a_loop_is_put_off(tmp_path: Path) -> None:
    async with secured(tmp_path) as fleet:
        pi = await fleet.join(await fleet.token(), "pi")
        for _ in range(9):
            await fleet.renew(pi)
        await refused(fleet.renew(pi), CODE.RESOURCE_EXHAUSTED)


async def test_a_revoked_device_is_out_at_once_and_after_a_restart(tmp_path: Path) -> None:
    async with secured(tmp_path) as fleet:
        pi = await fleet.join(await fleet.token(), "pi")
        new = await fleet.renew(pi)
        reply = await fleet.registry.RevokeIdentity(pb.RevokeIdentityRequest(kind=pb.IDENTITY_KIND_AGENT, name="pi", reason="sold"))
        assert reply.certificates == 2
        assert [await fleet.serves(who) for who in (pi, new)] == [CODE.UNAUTHENTICATED] * 2
        await refused(fleet.renew(pi), CODE.UNAUTHENTICATED)
        await refused(fleet.join(await fleet.token(), "pi"), CODE.ALREADY_EXISTS)
    async with secured(tmp_path) as fleet:
        assert [await fleet.serves(who) for who in (pi, new)] == [CODE.UNAUTHENTICATED] * 2
        (device,) = (await fleet.coordinator.control.ListDevices(control_pb2.ListDevicesRequest())).devices
        assert device.revoked
        back = await fleet.join(await fleet.token(name="pi", replace=True), "pi")
        assert await fleet.serves(back) is CODE.OK


async def test_a_quarantine_outlives_a_restart_and_a_token_that_replaces(tmp_path: Path) -> None:
    async with secured(tmp_path) as fleet:
        await fleet.join(await fleet.token(), "pi")
        await fleet.registry.SetQuarantine(pb.SetQuarantineRequest(device_name="pi", quarantined=True, reason="odd"))
    async with secured(tmp_path) as fleet:
        await fleet.join(await fleet.token(name="pi", replace=True), "pi", "device-0002")
        (device,) = (await fleet.coordinator.control.ListDevices(control_pb2.ListDevicesRequest())).devices
        assert (device.device_id, device.quarantine) == ("device-0002", "odd")
        assert dict(fleet.coordinator.running.roster.quarantined) == {"device-0002": "odd"}
        await fleet.registry.SetQuarantine(pb.SetQuarantineRequest(device_name="pi"))
        assert not fleet.coordinator.running.roster.quarantined


async def test_tokens_outlive_a_restart_with_the_uses_that_are_left(tmp_path: Path) -> None:
    async with secured(tmp_path) as fleet:
        token = await fleet.token(2)
        await fleet.join(token, "pi")
    async with secured(tmp_path) as fleet:
        assert (await last_token(fleet)).uses_left == 1
        await fleet.join(token, "pi2", "device-0002")
        await refused(fleet.join(token, "pi3", "device-0003"), CODE.UNAUTHENTICATED)


async def test_a_certificate_from_the_authority_that_is_in_no_list_is_refused(tmp_path: Path) -> None:
    async with secured(tmp_path) as fleet:
        pi = await fleet.join(await fleet.token(), "pi")
        authority = tlsfolder.read(tmp_path / "state" / "tls").authority
        from fleetune.wire import keys

        request = keys.make_request("pi")
        issued = authority.sign_agent(request.signing_request, "pi", DEVICE, 1, time.time())
        forged = replace(pi, key=request.key, certificate=issued.certificate)
        assert await fleet.serves(forged) is CODE.UNAUTHENTICATED


async def test_no_secret_of_a_token_is_stored(tmp_path: Path) -> None:
    async with secured(tmp_path) as fleet:
        token = await fleet.token()
    stored = b"".join(path.read_bytes() for path in (tmp_path / "state").glob("coordinator.sqlite*"))
    assert token.encode() not in stored


async def test_five_rotations_cut_nobody_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleetune.coordinator.certificates.RENEWALS_MAX", 100)
    async with secured(tmp_path) as fleet:
        who = {"pi": await fleet.join(await fleet.token(), "pi"), "ada": fleet.admin}
        answers: Counter[grpc.StatusCode] = Counter()
        done = asyncio.Event()
        begun = [0, 0]

        async def ask(number: int) -> None:
            while not done.is_set():
                begun[number] += 1
                answers[await fleet.serves(who["pi"])] += 1

        async def all_ask_anew() -> None:
            before = list(begun)
            while any(now == then for now, then in zip(begun, before, strict=True)):  # noqa: ASYNC110  # numbers that nobody announces
                await asyncio.sleep(0.001)

        asking = [asyncio.create_task(ask(number)) for number in range(2)]
        for _ in range(5):
            for first in (True, False):
                step = rotation.begin if first else functools.partial(rotation.finish, force=False)
                made = await asyncio.to_thread(step, tmp_path / "state")
                await taken_up(fleet, made.root_fingerprint)
                for name in ("pi", "ada"):
                    who[name] = await fleet.renew(who[name])
                # The next step ends the certificate before this one: nobody may be on the way with that any more.
                await asyncio.wait_for(all_ask_anew(), WAIT_S)
        done.set()
        await asyncio.gather(*asking)
        assert set(answers) == {CODE.OK}
        assert answers[CODE.OK] >= 10
        assert [len(await audit(fleet, action)) for action in ("ca rotate", "ca rotate --finish")] == [5, 5]
        # The first certificates come from a root that is gone.
        assert await fleet.serves(fleet.admin) is CODE.UNAVAILABLE


async def taken_up(fleet: Secured, root: str) -> None:
    """Whoever connects lets the coordinator look at its files; no more than that is needed."""

    async def look() -> None:
        while (authority := fleet.coordinator.running.roster.authority) is None or authority.fingerprint != root:
            await fleet.serves(fleet.admin)

    await asyncio.wait_for(look(), WAIT_S)
