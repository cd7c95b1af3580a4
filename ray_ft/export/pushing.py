"""An export to a repository of the Hugging Face hub, after the gate.

The token is the hub client's own: HF_TOKEN, or what ``hf auth login`` stored; it is never printed. Limits: one commit;
weights of an earlier push that the new one does not replace are deleted, since readers would take them.
"""

from __future__ import annotations

import re

from ray_ft.errors import ExportError, first_line

NAME = re.compile(r"[\w.-]+/[\w.-]+")
STALE = ["*.safetensors", "*.safetensors.index.json"]
KEPT = "the export itself is complete and stays: {folder}"


def refuse(repo: str) -> None:
    """Refuse what cannot work before anything is computed.

    Raises:
        ExportError: the name is none, or there is no token.
    """
    import huggingface_hub

    if not NAME.fullmatch(repo):
        raise ExportError(f"--push {repo!r} is no name of a hub repository", ["write ORGANISATION/NAME"])
    if not huggingface_hub.get_token():
        raise ExportError(
            f"there is no token to push to {repo} with",
            ["set HF_TOKEN to a token with write access", "or log in: hf auth login"],
        )


def push(folder: str, repo: str, message: str, shown: str) -> str:
    """Upload a folder; a repository that is not there is made, private. Returns its address.

    Args:
        shown: where people find the export, which an error names.

    Raises:
        ExportError: the hub refused it or cannot be reached.
    """
    import httpx2  # through which the hub's client speaks
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    api = huggingface_hub.HfApi()
    kept = KEPT.format(folder=shown)
    try:
        made = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repo, commit_message=message, delete_patterns=STALE)
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        ways = {
            401: "the hub does not know the token: set HF_TOKEN to a valid one, or log in again: hf auth login",
            403: f"the token may not write to {repo}: take one with write access, or push under a name of your own",
            404: f"{repo.partition('/')[0]} is no organisation or user of the hub that the token may write to",
        }
        raise ExportError(
            f"the hub refused {repo}{f' with status {status}' if status else ''}: {first_line(error)}",
            [*([ways[status]] if status in ways else []), "push again: ray-ft export RUN --push REPO", kept],
        ) from error
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise ExportError(
            f"the push to {repo} failed: {first_line(error)}",
            ["check the network and HF_ENDPOINT", "push again: ray-ft export RUN --push REPO", kept],
        ) from error
    return str(made)
