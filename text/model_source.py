"""From a model's name to a directory: the bundled model, a local path, or a Hugging Face id that is downloaded once."""

import re
from pathlib import Path

from ..core.errors import ConfigError

BUNDLED_MODEL = "baton-docs-6m"
# Weights, configuration, tokenizer, template. Never code, never a pickle.
ALLOWED_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_BUNDLED_FOLDER = Path(__file__).resolve().parents[1] / "models"


def resolve(model: str, *, option: str = "--model", bundled_folder: Path = _BUNDLED_FOLDER) -> Path:
    """A path that is there goes before an id of the same name. `option`: how the user named it.

    Raises ConfigError with one line of what to do.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _checked(path.resolve())
    if path.exists():
        raise ConfigError(f"{option} {model} is a file: give the directory that holds config.json.")
    if model == BUNDLED_MODEL:
        if (bundled_folder / model).is_dir():
            return _checked(bundled_folder / model)
        raise ConfigError(
            f"The bundled model {model} comes with the repository, not with the package: give {option} PATH or an id."
        )
    if not _is_hub_id(model):
        raise ConfigError(f"{option} {model}: there is no such directory.")
    return _checked(_download(model, option))


def is_local(model: str) -> bool:
    """False: it will be looked for on the hub."""
    return model == BUNDLED_MODEL or Path(model).expanduser().exists() or not _is_hub_id(model)


def _is_hub_id(model: str) -> bool:
    """False for what looks like a path."""
    return _HUB_ID.fullmatch(model) is not None and ".." not in model and "--" not in model


def served_name(model: str, directory: Path) -> str:
    """What clients call it: the id as given, else the directory's name."""
    return directory.name if Path(model).expanduser().is_dir() or model == BUNDLED_MODEL else model


def _checked(directory: Path) -> Path:
    if not (directory / "config.json").is_file():
        raise ConfigError(f"{directory} holds no config.json: give a directory with a checkpoint.")
    if not any(directory.glob("*.safetensors")):
        raise ConfigError(f"{directory} holds no *.safetensors: convert its weights, other formats are not read.")
    if not (directory / "tokenizer.json").is_file():
        raise ConfigError(f"{directory} holds no tokenizer.json: save the model's fast tokenizer beside its weights.")
    return directory


def _download(model_id: str, option: str) -> Path:
    """Into the Hugging Face cache, resumed where it stopped; HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE hold."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415  # 0.3 s, only for ids
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(model_id, allow_patterns=list(ALLOWED_FILES)))
    except GatedRepoError:
        raise ConfigError(f"{option} {model_id} is gated: accept its terms on the hub and set HF_TOKEN.") from None
    except RepositoryNotFoundError:
        raise ConfigError(
            f"{option} {model_id}: no such directory here and no such model on the hub; a private one needs HF_TOKEN."
        ) from None
    except LocalEntryNotFoundError:
        raise ConfigError(
            f"{option} {model_id}: there is no such directory here, and the hub could not be reached to look for one "
            "there: give a directory that is there, or go online once."
        ) from None
    except (HfHubHTTPError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{option} {model_id} could not be downloaded: {reason}") from None
