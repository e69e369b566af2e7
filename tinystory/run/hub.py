"""Files on the Hugging Face Hub."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from tinystory.run.errors import UserError


def download(
    repo: str, files: Sequence[str], repo_type: str = "dataset", revision: str | None = None
) -> list[Path]:
    """Local paths of a repository's files, downloaded unless in huggingface_hub's cache; its own
    variables (HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN) apply. Raises UserError
    on failure."""
    with reached(f"download {repo} from the Hugging Face Hub"):
        from huggingface_hub import hf_hub_download

        return [
            Path(hf_hub_download(repo, file, repo_type=repo_type, revision=revision))
            for file in files
        ]


@contextlib.contextmanager
def reached(doing: str) -> Iterator[None]:
    """Wraps requests to the Hub: its errors, network errors and a missing client become a
    UserError."""
    try:
        from huggingface_hub import errors
    except ImportError:
        raise UserError(f"cannot {doing}: pip install huggingface_hub first") from None
    try:
        yield
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:  # type: ignore[attr-defined]
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"cannot {doing} ({reason}): check the name, the network, HF_ENDPOINT and "
            "HF_HUB_OFFLINE; if it is gated, accept its terms there, then hf auth login"
        ) from None
