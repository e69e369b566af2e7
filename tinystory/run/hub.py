"""Files on the Hugging Face Hub."""

from collections.abc import Sequence
from pathlib import Path

from tinystory.run.errors import UserError


def download(
    repository: str, files: Sequence[str], repo_type: str = "dataset", revision: str | None = None
) -> list[Path]:
    """Local paths of a repository's files, downloaded unless they are in huggingface_hub's cache.

    The library's own variables configure cache, server and offline mode: HF_HOME, HF_HUB_CACHE, HF_ENDPOINT,
    HF_HUB_OFFLINE, HF_TOKEN.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise UserError(f"{repository} is on the Hugging Face Hub: pip install huggingface_hub first") from None
    paths = []
    for file in files:
        try:
            path = huggingface_hub.hf_hub_download(repository, file, repo_type=repo_type, revision=revision)
            paths.append(Path(path))
            continue
        except errors.LocalEntryNotFoundError:
            message = (
                f"cannot reach the Hugging Face Hub and {repository}/{file} is not in its cache: "
                "check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
            )
        except errors.GatedRepoError:
            message = f"{repository} is gated: accept its terms on the Hugging Face Hub, then hf auth login"
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError):
            at = f" at {revision}" if revision else ""
            message = f"the server has no {repository}/{file}{at}: check the name and HF_ENDPOINT"
        except errors.HFValidationError as error:
            message = f"{repository!r} is no repository's name: {str(error)[:200]}"
        except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]  # of the HTTP library below it
            status = getattr(getattr(error, "response", None), "status_code", None)
            why = f"the server answered {status}" if status else getattr(error, "strerror", "") or "connection lost"
            message = f"cannot download {repository}/{file}: {why}; check the network and HF_ENDPOINT, then try again"
        raise UserError(message)
    return paths
