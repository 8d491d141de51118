"""Who asks what over HTTP: the page, its JSON and events, metrics, health, and one action.

What keeps others out: the server is bound to loopback unless told otherwise, and then answers
only to names of this machine, so that no page of the web reaches it under its own name (DNS
rebinding). Nobody may frame, script or read the page from elsewhere. An action also needs a
token that only the page is told, in a header that a form cannot set, and must come from the page.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import mimetypes
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders, QueryParams
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from splitferry_consumer.web.metrics import CONTENT_TYPE
from splitferry_consumer.web.source import Source, Unanswered
from splitferry_consumer.web.status import (
    FIND_MAX,
    HOST,
    LIMIT_MAX,
    RequestView,
    Snapshot,
    Sort,
    View,
)
from splitferry_protocol.ids import RequestId
from splitferry_protocol.records import REASON_MAX

# The table is read from the system's files, now and not in the loop; they may say anything of
# scripts, and browsers run none of another type.
mimetypes.add_type("text/javascript", ".js")

STATIC = Path(__file__).with_name("static")
LOCAL_NAMES = ("127.0.0.1", "localhost", "::1", "[::1]")
STREAM_INTERVAL = 1.0
"""Seconds between two events of a stream."""
KEEP_ALIVE = 10.0
"""Seconds after which a stream without news says so."""
STREAMS_MAX = 32
BODY_MAX = 8 * 1024
"""Bytes of an action's body."""
TOKEN_HEADER = "X-Splitferry-Token"  # noqa: S105
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}

Abort = Callable[[RequestId, int, str], Awaitable[None]]
"""Writes the abort record of a request of a partition, with a reason. Raises ActionFailed, and
ValueError for a reason that no record can carry."""


class ActionFailed(Exception):
    """What was asked for was not done; one line for people."""


class Pages:
    """The answers about a consumer.

    Args:
        abort: what ends a request; None: no actions.
        local: the address of loopback that it is bound to; None: another one.
        ending: set when streams are to end.
    """

    def __init__(
        self,
        source: Source,
        ending: asyncio.Event,
        abort: Abort | None = None,
        local: str | None = "127.0.0.1",
    ) -> None:
        self._source = source
        self._ending = ending
        self._abort = abort
        self._token = None if abort is None else secrets.token_urlsafe(32)
        self._streams = 0
        self.app = self._application(local)

    def _application(self, local: str | None) -> Starlette:
        middleware = [Middleware(_SecurityHeaders)]
        if local:
            hosts = Middleware(
                TrustedHostMiddleware, allowed_hosts=[*LOCAL_NAMES, local], www_redirect=False
            )
            middleware.append(hosts)
        return Starlette(
            routes=[
                Route("/", self._page),
                Mount("/static", StaticFiles(directory=STATIC, check_dir=False)),
                Route("/status", self._status),
                Route("/events", self._events),
                Route("/requests/{id}", self._request),
                Route("/requests/{id}/abort", self._end, methods=["POST"]),
                Route("/metrics", self._expose),
                Route("/healthz", self._healthz),
                Route("/readyz", self._readyz),
            ],
            middleware=middleware,
        )

    # ---- looking

    async def _page(self, request: Request) -> Response:
        return FileResponse(STATIC / "index.html", media_type="text/html")

    async def _status(self, request: Request) -> Response:
        return _Encoded(self._shown(await self._source.snapshot(_view(request.query_params))))

    def _shown(self, snapshot: Snapshot) -> dict[str, Any]:
        """With what an action has to bring along; None without actions."""
        return {**snapshot, "actions": self._token is not None, "token": self._token}

    async def before(self, request: Request) -> Response:
        """The keys of the requests before a window, for who merges those of several processes."""
        return _Encoded(await self._source.before(_view(request.query_params)))

    async def _request(self, request: Request) -> Response:
        view = await self._found(_request_id(request))
        # It may have as many ranges as the request has gaps.
        text = await asyncio.to_thread(_encode, view)
        return Response(text, media_type="application/json")

    async def _found(self, wanted: RequestId) -> RequestView:
        """Raises HTTPException."""
        try:
            view = await self._source.request(wanted)
        except Unanswered as silence:
            raise HTTPException(503, str(silence)) from silence
        if view is None:
            raise HTTPException(404, "the request is not open in this consumer")
        return view

    async def _events(self, request: Request) -> Response:
        view = _view(request.query_params)
        if self._streams >= STREAMS_MAX:
            raise HTTPException(503, f"{STREAMS_MAX} pages are watching already: close one")
        self._streams += 1
        return _Events(self._stream(view), self._gone)

    def _gone(self) -> None:
        self._streams -= 1

    async def _stream(self, view: View) -> AsyncIterator[str]:
        mark: object = None
        told_at = 0.0
        while not self._ending.is_set():
            now = time.monotonic()
            mark, fresh = await self._source.news(view, mark)
            if fresh is not None:
                told_at = now
                yield f"event: status\ndata: {_encode(self._shown(fresh))}\n\n"
            elif now - told_at >= KEEP_ALIVE:
                told_at = now
                yield ": nothing new\n\n"
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STREAM_INTERVAL):
                    await self._ending.wait()

    async def _expose(self, request: Request) -> Response:
        return Response(await self._source.metrics(), media_type=CONTENT_TYPE)

    async def _healthz(self, request: Request) -> Response:
        alive = await self._source.alive()
        return JSONResponse(dict(alive), 200 if alive["ok"] else 503)

    async def _readyz(self, request: Request) -> Response:
        checks = await self._source.ready()
        ready = all(check["ok"] for check in checks.values())
        return JSONResponse({"ready": ready, "checks": checks}, 200 if ready else 503)

    # ---- acting

    async def _end(self, request: Request) -> Response:
        if self._abort is None or self._token is None:
            raise HTTPException(403, "actions are off: start the consumer with --web-actions")
        _check_origin(request, self._token)
        wanted = _request_id(request)
        reason = await _reason(request)
        found = await self._found(wanted)
        try:
            await self._abort(wanted, found["partition"], reason)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        except ActionFailed as error:
            raise HTTPException(502, str(error)) from error
        return PlainTextResponse("the abort record is written; its result follows", 202)


def _check_origin(request: Request, token: str) -> None:
    """Let only the page itself act. Raises HTTPException."""
    headers = request.headers
    host = headers.get("host", "")
    if not _is_own(host):
        raise HTTPException(403, "actions are for the consumer's own address, and not a name of it")
    same_origin = headers.get("origin", "") in {f"http://{host}", f"https://{host}"}
    same_site = headers.get("sec-fetch-site", "same-origin") == "same-origin"
    if not (same_origin and same_site):
        raise HTTPException(403, "actions are for the consumer's own page")
    if not hmac.compare_digest(headers.get(TOKEN_HEADER, "").encode(), token.encode()):
        raise HTTPException(403, "the page is of an earlier start: load it again")


def _is_own(host: str) -> bool:
    """Whether nobody else can make a browser send it: an address, or a name of this machine.

    A name of the web can be made to lead here after its page was loaded from elsewhere.
    """
    name = host[: host.rfind(":")] if re.search(r":[0-9]+$", host) else host
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return name.lower() in {"localhost", HOST.lower()}
    return True


async def _reason(request: Request) -> str:
    """The reason in the body, `{"reason": TEXT}`. Raises HTTPException."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "send the reason as application/json")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_MAX:
            raise HTTPException(413, f"the body has more than {BODY_MAX} bytes")
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        said = None
    reason = said.get("reason") if isinstance(said, dict) else None
    if not isinstance(reason, str) or not reason.strip():
        raise HTTPException(400, f'give a reason, up to {REASON_MAX} bytes: {{"reason": "…"}}')
    return reason.strip()


def _request_id(request: Request) -> RequestId:
    try:
        return RequestId.parse(request.path_params["id"])
    except ValueError as error:
        raise HTTPException(400, str(error)) from error


def _view(query: QueryParams) -> View:
    """Raises HTTPException."""
    find = query.get("find", "")
    if len(find) > FIND_MAX:
        raise HTTPException(400, f"find: at most {FIND_MAX} characters")
    try:
        sort = Sort(query.get("sort", Sort.OLDEST))
    except ValueError:
        raise HTTPException(400, f"sort: one of {', '.join(Sort)}") from None
    default = View()
    return View(
        _number(query, "offset", default.offset, 0, 2**31),
        _number(query, "limit", default.limit, 0, LIMIT_MAX),
        sort,
        find,
    )


def _number(query: QueryParams, name: str, default: int, least: int, most: int) -> int:
    text = query.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and least <= int(text) <= most):
        raise HTTPException(400, f"{name}: a number from {least} to {most}")
    return int(text)


def _encode(value: Any) -> str:
    # ASCII: whatever a producer wrote, it is one line, and no character of it means anything.
    return json.dumps(value, separators=(",", ":"))


class _Encoded(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return _encode(content).encode()


class _Events(StreamingResponse):
    """Calls `gone` when it is over, also where the stream itself never began."""

    def __init__(self, stream: AsyncIterator[str], gone: Callable[[], None]) -> None:
        super().__init__(
            stream, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"}
        )
        self._gone = gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._gone()


class _SecurityHeaders:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        await self._app(scope, receive, sending)
