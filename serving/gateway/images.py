"""Which images a request may bring: its own bytes, or an address on an allowlisted host.

The gateway never fetches anything. It lets through what an engine then may fetch, and an engine that runs vLLM has to
be told the same: ``--allowed-media-domains`` with these hosts, and ``VLLM_MEDIA_URL_ALLOW_REDIRECTS=0``, because where
an allowed host redirects to is only seen by who follows. How large an image unpacks to is vLLM's matter as well.
"""

from __future__ import annotations

import binascii
import re

from serving.gateway.refusal import Refusal, shown

#: Images of one request.
MOST_IMAGES = 16

_DATA = re.compile(r"data:image/(png|jpeg|webp|gif);base64,")
_START = {"png": b"\x89PNG\r\n\x1a\n", "jpeg": b"\xff\xd8\xff", "webp": b"RIFF", "gif": b"GIF8"}
#: Only what all URL parsers read alike: no user, no backslash, no other port, no character that needs escaping.
_HTTPS = re.compile(
    r"https://([a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?)(?::443)?(?:/[A-Za-z0-9._~!$&'()*+,;=:@%/?-]{0,2000})?"
)


def check(url: object, param: str, domains: tuple[str, ...]) -> None:
    """Let an image's address pass, or refuse it.

    Args:
        url: as it came.
        param: the field that it came in.
        domains: hosts that images may be fetched from.

    Raises:
        Refusal: 400: neither a data: URL with an image nor an https: one on an allowed host.
    """
    if not isinstance(url, str):
        raise Refusal(400, f"{param} is not a text", "invalid_field", param)
    if url[:5].lower() == "data:":
        _check_data(url, param)
        return
    match = _HTTPS.fullmatch(url)
    if match is None or match[1] not in domains:
        allowed = f" or https: on {', '.join(domains)}" if domains else ""
        raise Refusal(
            400,
            f"{param} {shown(url)} is not allowed: an image is a data: URL (data:image/png;base64,…){allowed}",
            "media_not_allowed",
            param,
        )


def _check_data(url: str, param: str) -> None:
    match = _DATA.match(url)
    if match is None:
        known = ", ".join(f"data:image/{kind};base64" for kind in _START)
        raise Refusal(400, f"{param} is not one of {known}", "invalid_image", param)
    try:
        content = binascii.a2b_base64(url[match.end() :], strict_mode=True)
    except ValueError:  # of which binascii.Error is a kind; non-ASCII text is another
        raise Refusal(400, f"{param} is not base64", "invalid_image", param) from None
    if not content.startswith(_START[match[1]]):
        raise Refusal(400, f"{param} does not hold a {match[1].upper()} image", "invalid_image", param)
