"""The addresses of `nightslide view`, and what each answers."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline import files
from pipeline.layout import SlideFolder
from pipeline.segment import annotations, pictures
from pipeline.view import deep_zoom, nuclei
from pipeline.view.results import Results
from slides.errors import NightslideError
from slides.geometry import Box

_STATIC = Path(__file__).parent / "static"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_FILES = (
    "ask.js",
    "slides.js",
    "slide.js",
    "nuclei.js",
    "view.css",
    "icon.svg",
    "openseadragon.min.js",
)  # loaded by the two pages

_STYLE_OF_OPENSEADRAGON = "'sha256-9xTiqzfwFaL2SGb1rmr8gysEwVVjIvqWAgmZgqFqpEE='"  # its only style sheet: a rule
_POLICY = (
    f"default-src 'none'; script-src 'self'; style-src 'self' {_STYLE_OF_OPENSEADRAGON}; img-src 'self'; "
    f"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",  # pictures of patients do not stay in the browser's cache
}

_THREADS = 4  # that answer; each has handles of its own of every open slide
_THUMBNAIL_PX = (320, 240)
_BINARY = "application/octet-stream"

Answer = Callable[[Results, Request], Response]


def application(results: Results, token: str, port: int) -> ASGIApp:
    """What serves the results under /TOKEN/, to requests for 127.0.0.1:PORT or localhost:PORT."""
    answers: dict[str, Answer] = {
        "/": lambda _, request: _file("slides.html"),
        "/slides.json": _slides,
        "/slides/{slide:int}/": lambda _, request: _file("slide.html"),
        "/slides/{slide:int}/thumbnail.jpg": _thumbnail,
        "/slides/{slide:int}/picture.json": _picture,
        "/slides/{slide:int}/picture/{level:int}/{col:int}_{row:int}.jpg": _picture_tile,
        "/slides/{slide:int}/nuclei.json": _nuclei,
        "/slides/{slide:int}/nuclei/{col:int}_{row:int}.bin": _nucleus_tile,
        "/slides/{slide:int}/nuclei/{row:int}.json": _nucleus,
        "/slides/{slide:int}/density.bin": _density,
        "/slides/{slide:int}/about.json": _about,
        "/slides/{slide:int}/{name}.geojson": _annotation,
        "/static/{name}": _static,
    }
    pool = ThreadPoolExecutor(_THREADS, "view")
    routes = [Route(path, _endpoint(answer, results, pool)) for path, answer in answers.items()]
    return _Guard(Starlette(routes=[Mount(f"/{token}", routes=routes)]), token, port)


class _Guard:
    """Lets in who knows the token and addresses this machine by its own name; adds the headers to every answer."""

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self._app = app
        self._token = token
        self._hosts = (f"127.0.0.1:{port}", f"localhost:{port}")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        refusal = self._refusal(scope)
        app = self._app if refusal is None else PlainTextResponse(refusal, 403)
        await app(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> str | None:
        """Why a request is refused; None where it is not."""
        hosts = Headers(scope=scope).getlist("host")
        if len(hosts) != 1 or hosts[0] not in self._hosts:
            return f"Host is {' '.join(hosts)!r}: need {' or '.join(self._hosts)}; forward the same port number"
        given = scope["path"].lstrip("/").partition("/")[0]
        if not secrets.compare_digest(given.encode(errors="replace"), self._token.encode()):
            return "The token is missing or wrong: use the whole address that `nightslide view` printed last."
        return None


def _endpoint(answer: Answer, results: Results, pool: ThreadPoolExecutor) -> Callable[[Request], Awaitable[Response]]:
    def answered(request: Request) -> Response:
        if request.path_params.get("slide", -1) >= len(results):
            raise HTTPException(404)
        try:
            return answer(results, request)
        except NightslideError as error:
            return JSONResponse({"problem": str(error)}, 409)

    async def endpoint(request: Request) -> Response:
        return await asyncio.get_running_loop().run_in_executor(pool, answered, request)

    return endpoint


def _file(name: str) -> Response:
    path = _STATIC / name
    return Response(path.read_bytes(), media_type=_TYPES[path.suffix])


def _binary(content: bytes | None, media_type: str = _BINARY) -> Response:
    if content is None:
        raise HTTPException(404)
    return Response(content, media_type=media_type)


def _static(_: Results, request: Request) -> Response:
    if request.path_params["name"] not in _FILES:
        raise HTTPException(404)
    return _file(request.path_params["name"])


def _slides(results: Results, _: Request) -> Response:
    return JSONResponse(results.ledger())


def _thumbnail(results: Results, request: Request) -> Response:
    small = pictures.reduced(results.folder(request.path_params["slide"]).thumbnail, _THUMBNAIL_PX)
    if small is None:
        raise HTTPException(404)
    file = BytesIO()
    small.save(file, "JPEG", quality=80)
    return _binary(file.getvalue(), "image/jpeg")


def _picture(results: Results, request: Request) -> Response:
    picture = results.picture(request.path_params["slide"])
    levels = picture.levels
    return JSONResponse(
        {
            "um_per_px": picture.slide.scale[:2],
            "width": picture.size.width,
            "height": picture.size.height,
            "tileSize": deep_zoom.TILE_PX,
            "minLevel": levels[0],
            "maxLevel": levels[-1],
        }
    )


def _picture_tile(results: Results, request: Request) -> Response:
    where = request.path_params
    return _binary(results.picture(where["slide"]).tile(where["level"], where["col"], where["row"]), "image/jpeg")


def _nuclei(results: Results, request: Request) -> Response:
    table = results.nuclei(request.path_params["slide"])
    classes = zip(table.classes.items(), table.class_counts(), strict=True)
    return JSONResponse(
        {
            "count": len(table),
            "size": table.size,
            "um_per_px": table.um_per_px,
            "lowest_score": table.lowest_score(),
            "classes": [{"name": name, "colour": colour, "count": count} for (name, colour), count in classes],
            "tile_px": nuclei.TILE_PX,
            "tiles": table.tiles,
            "overhang_px": table.overhang_px,
            "cell_px": table.cell_px,
            "cells": table.cells,
        }
    )


def _nucleus_tile(results: Results, request: Request) -> Response:
    where = request.path_params
    return _binary(results.nuclei(where["slide"]).tile(where["col"], where["row"]))


def _nucleus(results: Results, request: Request) -> Response:
    where = request.path_params
    nucleus = results.nuclei(where["slide"]).nucleus(where["row"])
    if nucleus is None:
        raise HTTPException(404)
    return JSONResponse(nucleus)


def _density(results: Results, request: Request) -> Response:
    try:
        score = float(request.query_params.get("score", "0"))
        classes = [int(number) for number in request.query_params.getlist("class")]
    except ValueError as error:
        raise HTTPException(400) from error
    counts = results.nuclei(request.path_params["slide"]).density(score, classes)
    return _binary(counts.astype("<u4").tobytes())


def _about(results: Results, request: Request) -> Response:
    """The slide's row of the ledger, and which annotations there are beside its nuclei."""
    number = request.path_params["slide"]
    row = next((row for row in results.ledger() if row["number"] == number), {"slide": results.name(number)})
    return JSONResponse({**row, "annotations": list(_annotations(results.folder(number)))})


def _annotation(results: Results, request: Request) -> Response:
    """GeoJSON with coordinates from the corner of the slide's bounds, as those of the picture."""
    folder = results.folder(request.path_params["slide"])
    path = _annotations(folder).get(request.path_params["name"])
    try:
        bounds = Box(*(files.read_json(folder.slide_json) or {})["bounds"])
    except (KeyError, TypeError) as error:  # it is not done, or damaged: the picture says so
        raise HTTPException(404) from error
    if path is None:
        raise HTTPException(404)
    try:
        features = annotations.features_from(path, bounds.corner, bounds)
        return JSONResponse({"type": "FeatureCollection", "features": features}, media_type="application/geo+json")
    except (TypeError, ValueError) as error:  # bounds that are no numbers, coordinates that JSON does not know
        raise HTTPException(404) from error


def _annotations(folder: SlideFolder) -> dict[str, Path]:
    """The files of annotations that there are, by what they outline."""
    paths = {"tissue": folder.tissue_annotation, "artefacts": folder.artefact_annotations}
    return {name: path for name, path in paths.items() if path.is_file()}
