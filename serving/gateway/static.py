"""The playground's files, read into memory at the start: there is no path that could lead to another file."""

from __future__ import annotations

from pathlib import Path

from serving.gateway.exchange import Exchange

FOLDER = Path(__file__).parent.parent / "playground"
KINDS = {
    ".html": b"text/html; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".svg": b"image/svg+xml",
    ".png": b"image/png",
    ".ico": b"image/x-icon",
    ".woff2": b"font/woff2",
}
#: Only files of this server run in the page, and it talks to this server alone; chosen images are shown from memory.
POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; connect-src 'self'; "
    b"img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", POLICY),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-opener-policy", b"same-origin"),
)


class Static:
    """Files under ``/playground/``, by the path that asks for them."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._files: dict[str, tuple[bytes, bytes]] = {}
        for file in sorted(folder.glob("*")):
            kind = KINDS.get(file.suffix)
            if kind is not None and file.is_file() and not file.is_symlink():
                self._files[f"/playground/{file.name}"] = (kind, file.read_bytes())
        if "/playground/index.html" in self._files:
            self._files["/playground/"] = self._files["/playground/index.html"]

    def __contains__(self, path: str) -> bool:
        return path in self._files

    async def answer(self, exchange: Exchange) -> None:
        kind, content = self._files[exchange.path]
        await exchange.reply(200, content, [(b"content-type", kind), *HEADERS])
