"""The gate before every handler: who calls, whether that one still stands, whether it may, and how its calls are ended at once."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, Protocol

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from fleetune.coordinator import principal as principals
from fleetune.coordinator.principal import LOCAL, Principal
from fleetune.coordinator.rpc import permissions
from fleetune.coordinator.rpc.refusals import Refusals
from fleetune.coordinator.rpc.streams import begin, hang_up
from fleetune.errors import WireError

CERTIFICATES_KEPT = 4096
"""Certificates whose reading is remembered, about 2 KiB each."""

Standing = Callable[[Principal], str]
"""Why a caller whose certificate is sound is not taken all the same (revoked, unknown), for a person; empty where it is."""

_CALLER: contextvars.ContextVar[Principal] = contextvars.ContextVar("fleetune-caller")


def caller() -> Principal:
    """Who made the call that is being handled. LookupError outside of one: nothing is anybody's by default."""
    return _CALLER.get()


def refuse(why: str) -> None:
    """Note in the log that the present call asked for something that is not its caller's."""
    _REFUSALS.get().note(str(caller()), _METHOD.get(), why)


class Context(Protocol):
    """The part of a servicer context that the gate needs."""

    def auth_context(self) -> Mapping[str, Any]: ...  # Any: the stubs say iterables of bytes, the library gives lists

    def peer(self) -> str: ...

    async def abort(self, code: grpc.StatusCode, details: str = ..., trailing_metadata: tuple[()] = ...) -> NoReturn: ...

    async def write(self, message: Any) -> None: ...  # Any: of the method's own type

    def send_initial_metadata(self, initial_metadata: tuple[()]) -> Coroutine[Any, Any, None]: ...  # Any: what asyncio is sent


class Gate(grpc.aio.ServerInterceptor):
    """Wraps every handler of a server. Calls of one principal are kept while they are open, so that `cut` can end them.

    `plaintext`: a server on loopback without TLS, where everybody is LOCAL.
    """

    def __init__(
        self,
        standing: Standing,
        plaintext: bool,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._standing = standing
        self._plaintext = plaintext
        self._wall = wall
        self._known: dict[bytes, _Known] = {}
        self._open: dict[tuple[str, str], _Caller] = {}
        self._guarded: dict[str, tuple[object, grpc.RpcMethodHandler[Any, Any]]] = {}
        self.refusals = Refusals(monotonic)
        self.answered: dict[tuple[str, str], int] = {}
        """Method and gRPC status -> calls that have ended with it."""

    def cut(self, kind: principals.Kind, name: str, why: str = "this certificate was revoked") -> int:
        """End every open call of this principal now, with PERMISSION_DENIED; their number. The call that asks for it is left."""
        found = self._open.get((kind, name))
        return 0 if found is None else sum(call.end(why) for call in tuple(found.calls))

    def open_calls(self) -> int:
        """Of all callers."""
        return sum(len(found.calls) for found in self._open.values())

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],  # Any: of every service
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:  # no such method, which gRPC answers with UNIMPLEMENTED
            return None
        known = self._guarded.get(method)
        if known is None or known[0] is not handler:
            known = self._guarded[method] = (handler, self._guard(method, handler))
        return known[1]

    # -- one call

    def _guard(self, method: str, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:  # Any: the stubs leave the handler's fields out
        """The same handler behind the gate. Its requests are parsed behind it, too."""
        behave: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        decode = handler.request_deserializer or _as_it_is
        parse = _as_it_is if handler.request_streaming else decode
        generates = inspect.isasyncgenfunction(behave)
        if not generates and not inspect.iscoroutinefunction(behave):
            behave = _missing  # what the generated code has for a method that nobody wrote
        lasting = handler.request_streaming or handler.response_streaming

        async def through(request: Any, context: Any) -> Any:
            async def run() -> Any:
                answer: Any = behave(parse(request), context)
                return await (_written(answer, context) if generates else answer)

            code = "OK"
            try:
                return await self._through(method, context, run, lasting=lasting, writes=handler.response_streaming)
            except BaseException as error:
                code = _ended_with(error, context)
                raise
            finally:
                self.answered[method, code] = self.answered.get((method, code), 0) + 1

        encode = handler.response_serializer
        if handler.request_streaming:
            make = grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
            return make(through, decode if handler.request_deserializer else None, encode)
        make = grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        return make(through, None, encode)

    async def _through(
        self, method: str, context: Context, run: Callable[[], Coroutine[Any, Any, Any]], *, lasting: bool, writes: bool
    ) -> Any:
        known = self._who(context)
        if known is None:
            await self._deny(context, context.peer(), method, grpc.StatusCode.UNAUTHENTICATED, "its certificate is nobody's of this fleet")
        principal, until_unix_s = known.principal, known.until_unix_s
        if self._wall() > until_unix_s:
            await self._deny(context, str(principal), method, grpc.StatusCode.UNAUTHENTICATED, "its certificate has run out")
        if why := self._standing(principal):
            await self._deny(context, str(principal), method, grpc.StatusCode.UNAUTHENTICATED, why)
        if why := permissions.objection(principal, method):
            await self._deny(context, str(principal), method, grpc.StatusCode.PERMISSION_DENIED, why)
        key = (principal.kind, principal.name)
        here = self._open.get(key)
        if here is None:
            here = self._open[key] = _Caller()
        most = permissions.at_once(principal, method)
        if most is not None and here.counts.get(method, 0) >= most:
            why = f"{most} of these calls are open already"
            await self._deny(context, str(principal), method, grpc.StatusCode.RESOURCE_EXHAUSTED, why)
        call = here.enter(method)
        ends = lasting and not self._plaintext
        if ends:
            call.end_after(until_unix_s - self._wall())
        _CALLER.set(principal)
        _METHOD.set(method)
        _REFUSALS.set(self.refusals)
        try:
            if ends and writes:  # a single answer goes out when the handler has returned, and may begin when it likes
                await begin(context)
            return await run()
        except asyncio.CancelledError:
            if not call.ended_because:
                raise
            call.wake()
            self.refusals.note(str(principal), method, call.ended_because)
            await hang_up(context, call.ended_with, f"{method.rpartition('/')[2]} is ended: {call.ended_because}")
        except (DecodeError, WireError) as error:
            self.refusals.note(str(principal), method, "a message that cannot be read")
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"a message cannot be read: {error}")
        finally:
            here.leave(call)
            if not here.calls and self._open.get(key) is here:
                del self._open[key]

    async def _deny(self, context: Context, who: str, method: str, code: grpc.StatusCode, why: str) -> NoReturn:
        self.refusals.note(who, method, why)
        await context.abort(code, f"{method.rpartition('/')[2]} is refused: {why}")

    def _who(self, context: Context) -> _Known | None:
        """Who holds the certificate of this connection; None for one that is nobody's."""
        if self._plaintext:
            return _LOCAL
        pems = context.auth_context().get("x509_pem_cert", ())
        if len(pems) != 1:
            return None
        found = self._known.get(pems[0])
        if found is None:
            found = _read(pems[0])
            if found is not None:
                if len(self._known) >= CERTIFICATES_KEPT:
                    self._known.clear()
                self._known[pems[0]] = found
        return found


@dataclass(frozen=True, slots=True)
class _Known:
    principal: Principal
    until_unix_s: float


_LOCAL = _Known(LOCAL, float("inf"))


_CODES: dict[object, grpc.StatusCode] = {told: code for code in grpc.StatusCode for told in (code, code.value[0])}
"""By themselves and by their numbers: the asyncio server has it that way."""

_METHOD: contextvars.ContextVar[str] = contextvars.ContextVar("fleetune-method")
_REFUSALS: contextvars.ContextVar[Refusals] = contextvars.ContextVar("fleetune-refusals")


@dataclass(slots=True)
class _Caller:
    """The open calls of one principal."""

    calls: set[_Call] = field(default_factory=set["_Call"])
    counts: dict[str, int] = field(default_factory=dict[str, int])

    def enter(self, method: str) -> _Call:
        call = _Call(method)
        self.calls.add(call)
        self.counts[method] = self.counts.get(method, 0) + 1
        return call

    def leave(self, call: _Call) -> None:
        call.forget()
        self.calls.discard(call)
        left = self.counts[call.method] - 1
        if left:
            self.counts[call.method] = left
        else:
            del self.counts[call.method]


class _Call:
    """One open call, made in the task that handles it."""

    __slots__ = ("_task", "_timer", "ended_because", "ended_with", "method")

    def __init__(self, method: str) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.method = method
        self.ended_because = ""
        self.ended_with = grpc.StatusCode.PERMISSION_DENIED
        self._task = task
        self._timer: asyncio.TimerHandle | None = None

    def end(self, why: str, code: grpc.StatusCode = grpc.StatusCode.PERMISSION_DENIED) -> bool:
        """End it from outside; False where it is the very call that asks, or is ending already."""
        if self.ended_because or self._task is asyncio.current_task():
            return False
        self.ended_because, self.ended_with = why, code
        self._task.cancel()
        return True

    def end_after(self, delay_s: float) -> None:
        """A stream must not outlive the certificate that opened it. Whoever has renewed it since may come back at once."""
        code = grpc.StatusCode.UNAVAILABLE
        self._timer = asyncio.get_running_loop().call_later(delay_s, self.end, "its certificate has run out", code)

    def wake(self) -> None:
        """The cancellation has done its work and is none for whatever comes now."""
        if sys.version_info >= (3, 11):
            self._task.uncancel()

    def forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def _ended_with(error: BaseException, context: Any) -> str:  # Any: the method by which contexts tell their code is not in the protocol
    """The status that the caller gets for what a handler ended with."""
    if isinstance(error, asyncio.CancelledError):
        return grpc.StatusCode.CANCELLED.name
    code = context.code() if isinstance(error, grpc.aio.AbortError) else grpc.StatusCode.UNKNOWN
    return _CODES.get(code, grpc.StatusCode.UNKNOWN).name


def _as_it_is(request: Any) -> Any:  # Any: bytes, or an iterator of messages
    return request


async def _missing(request: Any, context: Any) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this coordinator does not have the method")


async def _written(responses: AsyncIterator[Any], context: Context) -> None:
    async with contextlib.aclosing(responses):  # type: ignore[type-var]  # an async generator, which the caller has looked at
        async for response in responses:
            await context.write(response)


def _read(pem: bytes) -> _Known | None:
    """What a certificate says that TLS has found sound. Slow: it is read once."""
    from cryptography import x509  # here, since a coordinator without TLS has no use for it
    from cryptography.hazmat.primitives import hashes

    try:
        certificate = x509.load_pem_x509_certificate(pem)
        names = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        uris = extension.value.get_values_for_type(x509.UniformResourceIdentifier)
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension):
        return None
    if len(names) != 1:
        return None
    principal = principals.read(str(names[0].value), uris, certificate.fingerprint(hashes.SHA256()).hex())
    if principal is None:
        return None
    principal = replace(principal, begins_unix_s=certificate.not_valid_before_utc.timestamp())
    return _Known(principal, certificate.not_valid_after_utc.timestamp())
