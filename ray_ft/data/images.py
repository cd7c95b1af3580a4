"""Images that rows name or hold, as the bytes of a file that is known to open; and such bytes as a picture.

A row holds an image as bytes, as a data: URL, by a path on its data file's storage (a relative one begins beside that
file), or by an https: address on a host that the recipe allows. Nothing else is reached: rows come from strangers, and
what they name is read by this machine, with its rights. Every image is unpacked once when it is looked at, so that one
which does not open is a rejected row and not a run that ends at step 9,000. Limits: PNG, JPEG, WebP and GIF (of which
the first frame is taken), as chat endpoints take them.
"""

from __future__ import annotations

import base64
import binascii
import io
import posixpath
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from ray_ft import paths
from ray_ft.data.files import File, public_name
from ray_ft.errors import StorageError, first_line
from ray_ft.recipe import Images
from ray_ft.retry import may_pass, patiently

if TYPE_CHECKING:
    import PIL.Image

KINDS = ("PNG", "JPEG", "WEBP", "GIF")
STARTS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"GIF8")  # of files of these kinds
FETCH_SECONDS = 30.0


class BadImage(Exception):
    """Why a row's image is not used; `reason` and `detail` as of `lines.Reject`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class ImageReader:
    """Reads the images of one data file's rows.

    Attributes:
        base: location of the data file, beside which relative paths begin.
    """

    base: str
    settings: Images

    @classmethod
    def of(cls, file: File, settings: Images | None) -> ImageReader | None:
        """None where the recipe takes no images."""
        return None if settings is None else cls(file.uri, settings)

    def read(self, value: Any) -> bytes:
        """The image's file, whole and checked.

        Args:
            value: bytes; {"bytes", "path"}, as Hugging Face datasets keep images; {"url"}, as OpenAI's messages do; a
                path, data: URL or https: address.

        Raises:
            BadImage: it cannot be used.
            StorageError: what it lies on does not answer.
        """
        if isinstance(value, dict):
            value = next((value[key] for key in ("bytes", "path", "url") if value.get(key) is not None), None)
        if isinstance(value, bytes):
            content = value
        elif not isinstance(value, str) or not value:
            raise BadImage("no image", f"{type(value).__name__} in its place" if value is not None else "")
        elif value[:5].lower() == "data:":
            content = self._unpacked(value)
        elif value.lower().startswith(("http://", "https://")):
            content = self._fetched(value)
        else:
            content = self._stored(value)
        self._check_size(len(content))
        return self._checked(content)

    def _check_size(self, size: int) -> None:
        if size > self.settings.max_bytes:
            raise BadImage("image too large", f"{size} bytes, over data.images.max_bytes = {self.settings.max_bytes}")

    def _checked(self, content: bytes) -> bytes:
        from PIL import Image, UnidentifiedImageError

        if not content:
            raise BadImage("image is empty")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is below
                opened = Image.open(io.BytesIO(content), formats=KINDS)
                pixels = opened.width * opened.height
                if pixels > self.settings.max_pixels:
                    raise BadImage(
                        "image too large",
                        f"{opened.width} × {opened.height}, over data.images.max_pixels = {self.settings.max_pixels}",
                    )
                opened.load()
        except Image.DecompressionBombError as error:
            raise BadImage("image too large", first_line(error)) from error
        except UnidentifiedImageError as error:
            if content.startswith(STARTS):
                raise BadImage("image is damaged", "its head cannot be read") from error
            raise BadImage("not a PNG, JPEG, WebP or GIF image", f"it begins with {content[:8]!r}") from error
        except (OSError, ValueError, SyntaxError, EOFError, IndexError, MemoryError) as error:  # what its readers raise
            raise BadImage("image is damaged", first_line(error)) from error
        return content

    def _unpacked(self, url: str) -> bytes:
        head, comma, body = url.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise BadImage("data: URL without base64", repr(head[:60]))
        try:
            return binascii.a2b_base64(body, strict_mode=True)
        except ValueError as error:  # of which binascii.Error is a kind
            raise BadImage("data: URL without base64", first_line(error)) from error

    def _stored(self, path: str) -> bytes:
        location = self._location(path)
        shown = public_name(location)
        try:
            return patiently(lambda: self._file(location, shown))
        except (OSError, pa.ArrowException) as error:
            if may_pass(error):
                raise StorageError(f"the image {shown} cannot be read: {first_line(error)}", ["try again"]) from None
            raise BadImage("image cannot be read", f"{shown}: {first_line(error)}") from None

    def _location(self, path: str) -> str:
        """Where a path of a row lies: on the data file's own storage, reached as the data file is."""
        head, query = paths.split_query(self.base)
        scheme = head.partition("://")[0] if paths.is_uri(head) else "file"
        if paths.is_uri(path):
            # Another protocol may fetch from anywhere, and a query may send this machine's keys there.
            other = path.partition("://")[0] != scheme or "?" in path
        else:
            other = path.startswith("/") and paths.is_uri(head)  # a path of a machine
        if other or "\0" in path:
            raise BadImage("image on another storage than its data file", repr(path[:80]))
        if paths.is_uri(path) or path.startswith("/"):
            return path + query
        return posixpath.join(paths.parent(head), path) + query

    def _file(self, location: str, shown: str) -> bytes:
        fs, path = paths.filesystem(location)
        info = fs.get_file_info(path)
        if info.type != pafs.FileType.File:
            raise BadImage("image not found", shown)
        self._check_size(info.size or 0)
        with fs.open_input_stream(path, compression=None) as stream:
            return stream.read(self.settings.max_bytes + 1)

    def _fetched(self, url: str) -> bytes:
        import httpx

        parts = urlsplit(url)
        if parts.scheme.lower() != "https" or parts.hostname not in self.settings.hosts or parts.username or parts.port:
            allowed = ", ".join(self.settings.hosts) or "none"
            raise BadImage("image address not allowed", f"{url[:120]!r}; https on data.images.hosts: {allowed}")

        def get() -> bytes:
            try:
                # Not to where it may redirect: that is another host, which nobody has allowed.
                with httpx.stream("GET", url, timeout=FETCH_SECONDS, follow_redirects=False) as response:
                    if response.status_code >= 500 or response.status_code == 429:
                        raise OSError(f"status {response.status_code}")
                    if response.status_code != 200:
                        raise BadImage("image not found", f"{url[:120]!r} answers {response.status_code}")
                    content = b""
                    for block in response.iter_bytes():
                        content += block
                        self._check_size(len(content))
                    return content
            except httpx.HTTPError as error:
                raise OSError(first_line(error)) from None

        try:
            return patiently(get)
        except OSError as error:
            raise StorageError(
                f"the image {url[:120]!r} cannot be fetched: {first_line(error)}",
                ["try again when its host answers", "keep the images beside the data"],
            ) from None


def picture(content: bytes) -> PIL.Image.Image:
    """The image in a checked file as models are shown it: upright, opaque on white, RGB; as vLLM shows it too."""
    from PIL import Image, ImageOps

    opened: Image.Image = ImageOps.exif_transpose(Image.open(io.BytesIO(content), formats=KINDS))
    if opened.mode in ("RGBA", "LA", "PA") or "transparency" in opened.info:
        opened = opened.convert("RGBA")
        ground = Image.new("RGB", opened.size, (255, 255, 255))
        ground.paste(opened, mask=opened.getchannel("A"))
        return ground
    return opened.convert("RGB")


def data_url(content: bytes) -> str:
    """A checked file as ``data:image/png;base64,…``, as OpenAI's messages carry it."""
    from PIL import Image

    kind = Image.MIME[Image.open(io.BytesIO(content), formats=KINDS).format or "PNG"]
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
