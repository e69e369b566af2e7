"""Downloads files from the Hugging Face Hub."""

from collections.abc import Sequence
from pathlib import Path

from tinystory.run.errors import UserError


def download(
    repo: str, files: Sequence[str], repo_type: str = "dataset", revision: str | None = None
) -> list[Path]:
    """Local paths of a repository's files, which are downloaded unless they are in
    huggingface_hub's cache. The environment variables of huggingface_hub apply (HF_HOME,
    HF_HUB_CACHE, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN). Raises UserError on failure."""
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError:
        raise UserError(
            f"cannot download {repo} from the Hugging Face Hub: pip install huggingface_hub first"
        ) from None
    try:
        return [
            Path(hf_hub_download(repo, file, repo_type=repo_type, revision=revision))
            for file in files
        ]
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:  # type: ignore[attr-defined]
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"cannot download {repo} from the Hugging Face Hub ({reason}): check the name, the network, HF_ENDPOINT "
            "and HF_HUB_OFFLINE; if the repository is gated, accept its terms on the Hub, then run hf auth login"
        ) from None
