"""Rules on the Hugging Face Hub: a repository with the file of a rule and a card that says what it is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from l2l_fast.spec import LogAndSign, RuleSpec

FILE = "rule.safetensors"
CARD = "README.md"


def find(source: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None) -> Path:
    """The file of a rule: ``source`` itself, ``rule.safetensors`` in the folder ``source``, or that of a repository.

    What lies here wins: then neither the network nor huggingface_hub is asked. A downloaded file stays in the cache of
    huggingface_hub, which serves it without a network.

    Raises:
        FileNotFoundError: if ``source`` is a path at which nothing lies, or there is no such repository, revision or
            file in it.
        PermissionError: if the repository asks for a consent that this account has not given.
        TypeError: if ``source`` is of another kind.
        ValueError: if ``source`` is neither a path nor the id of a repository, or a path comes with a revision.
        ConnectionError: if the Hub can't be reached and the file is not in the cache.
        ImportError: if it takes huggingface_hub, which is not installed.
    """
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"expected the id of a repository, 'user/name', or the path of a file or folder, got {source!r} of type "
            f"{type(source).__name__}"
        )
    name, path = os.fspath(source), Path(source).expanduser()
    if name and path.exists():
        if revision is not None:
            raise ValueError(f"{path} lies here and has no revision, got revision={revision!r}; leave it out")
        return path / FILE if path.is_dir() else path
    if isinstance(source, os.PathLike) or name.startswith(("/", ".", "~")) or name.endswith(".safetensors"):
        raise FileNotFoundError(f"there is no file or folder {path}")
    _check_id(name)
    hub = _huggingface_hub()
    with _explained(name, revision):
        return Path(hub.hf_hub_download(name, FILE, revision=revision, token=token))


def push(
    file: Path,
    spec: RuleSpec,
    card: Mapping[str, Any],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Put ``file`` and its card into a repository in one commit, whose address is returned.

    Raises:
        ValueError: if ``repo_id`` is none.
        PermissionError: if the account may not write there, or there is no account.
        ConnectionError: if the Hub can't be reached.
        ImportError: if huggingface_hub is not installed.
    """
    _check_id(repo_id)
    hub = _huggingface_hub()
    api = hub.HfApi(token=token)
    with _explained(repo_id, None):
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            operations=[
                hub.CommitOperationAdd(FILE, file),
                hub.CommitOperationAdd(CARD, model_card(spec, card, repo_id).encode()),
            ],
            commit_message="Rule and card",
        )
    return str(commit.commit_url)


def model_card(spec: RuleSpec, card: Mapping[str, Any], repo_id: str) -> str:
    """What a visitor of the repository reads: what the rule is, what it was trained on, its limits, how to load it."""
    preprocess = f"log and sign, p = {spec.preprocess.p:g}" if isinstance(spec.preprocess, LogAndSign) else "none"
    trained_on = card.get("trained_on") or card.get("problem") or "Its card does not say."
    limits = card.get("limits") or (
        "Its card does not say. A rule does well on what it was trained on, for about as many steps as it was trained "
        "for: compare it with a tuned optimizer on your problem before you rely on it."
    )
    return f"""---
library_name: l2l_fast
tags:
- learned-optimizer
- learning-to-learn
---

# {_line(card.get("name") or repo_id)}

A learned optimizer: a coordinatewise LSTM that turns each gradient into an update
([Andrychowicz et al. 2016](https://arxiv.org/abs/1606.04474)). Two layers of {spec.hidden_size} units, preprocessing of
gradients: {preprocess}, output scale {spec.output_scale:g}.

## How to load it

With l2l_fast and its extra `hub`:

```python
import l2l_fast

rule = l2l_fast.CoordinatewiseLSTM.from_hub("{repo_id}")
optimizer = l2l_fast.LearnedOptimizer(model.parameters(), rule=rule)
```

## Trained on

{_line(trained_on)}

## Limits

{_line(limits)}

## Card

```json
{json.dumps(card, indent=2)}
```
"""


def _line(text: Any) -> str:
    """``text`` as one line, so that nothing in it starts a heading or a block of the card."""
    return " ".join(str(text).split())


def _check_id(repo_id: str) -> None:
    if not isinstance(repo_id, str) or len(repo_id.split("/")) != 2 or not all(repo_id.split("/")):
        raise ValueError(
            f"expected the id of a repository, 'user/name', or a file or folder that is here, got {repo_id!r}; a rule "
            "that comes with the package is loaded by l2l_fast.load_rule"
        )


def _huggingface_hub() -> Any:
    try:
        return import_module("huggingface_hub")
    except ImportError as error:
        raise ImportError(
            "rules on the Hugging Face Hub take the package huggingface_hub, which is not installed; "
            "pip install 'l2l_fast[hub]'. A file or folder that is here takes neither it nor the network"
        ) from error


@contextmanager
def _explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """Errors of huggingface_hub as those of Python, with what to do about them."""
    errors = import_module("huggingface_hub.errors")
    account = "log in with `hf auth login` or pass token=..."
    try:
        yield
    except errors.HFValidationError as error:
        raise ValueError(f"{repo_id!r} can't be the id of a repository: {error}") from error
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"the repository {repo_id} asks for a consent: give it on its page, then {account}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"there is neither a file or folder {repo_id} here nor a repository of that name that this account may "
            f"read; check the name, or if it is private {account}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"the repository {repo_id} has no revision {revision!r}") from error
    except errors.LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"the repository {repo_id} can't be reached ({error.__cause__ or error}), and its {FILE} has not been "
            "downloaded before; a file or folder that is here takes no network"
        ) from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(
            f"the repository {repo_id} has no {FILE} at revision {revision or 'main'!r}, as "
            "CoordinatewiseLSTM.push_to_hub writes it; its files are not looked through for another one"
        ) from error
    except errors.HTTPError as error:
        response = getattr(error, "response", None)
        if response is not None and response.status_code in (401, 403):
            raise PermissionError(f"the Hub refused this account for the repository {repo_id}: {account}") from error
        raise ConnectionError(f"the repository {repo_id} can't be reached: {error}") from error
