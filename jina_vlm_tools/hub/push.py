"""A checked folder becomes one commit on the Hub, and what arrived is compared with what was sent.

One commit, by `create_commit`: the target's branch moves once, from what it was to all of the bundle. (`upload_folder`
makes several where Xet is installed, and a branch between two of them loads as something that nobody checked.) The
large files are sent before it, addressed by their content: after an interruption those that arrived are found there
and not sent again.
"""

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import get_session, hf_raise_for_status, validate_repo_id

from . import PublishingError


KEPT = ".gitattributes"  # the Hub's own


@dataclass
class Target:
    """Where a bundle goes. `start` is the commit that its commit follows, and `files` what that one holds; both are
    empty for a repository that is yet to be made. `is_new_branch`: the branch is yet to be made, from `main`."""

    repo_id: str
    revision: str | None = None
    create_pr: bool = False
    start: str | None = None
    files: list[str] = field(default_factory=list)
    is_new_branch: bool = False


def check_name(repo_id: str) -> None:
    """
    Raises:
        PublishingError: this is not owner/name.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishingError(f"--repo-id {repo_id}: {error}") from error
    if "/" not in repo_id:
        raise PublishingError(f"--repo-id {repo_id}: expected owner/name, such as me/jina-vlm-transformers.")


def find_target(
    api: HfApi,
    repo_id: str,
    *,
    revision: str | None = None,
    create_pr: bool = False,
    private: bool = False,
    replace: bool = False,
) -> Target:
    """
    What is at the target now. Reads only.

    Raises:
        PublishingError: there is no token; a pull request has no repository; a public one cannot hold what shall be
            private; or the branch holds files and `replace` is false.
        HfHubHTTPError: the Hub refuses, or knows the token not.
    """
    if get_token() is None and api.token is None:
        raise PublishingError(
            "There is no token for the Hub. Run `hf auth login`, or set the environment variable HF_TOKEN; "
            f"make one that may write, at {constants.ENDPOINT}/settings/tokens."
        )
    api.whoami()  # a token that is not valid is told here, and not when all is assembled
    target = Target(repo_id, revision, create_pr)
    try:
        info = api.repo_info(repo_id)
    except RepositoryNotFoundError:
        if create_pr:
            raise PublishingError(
                f"{repo_id} is not there, or not for you: a pull request needs a repository."
            ) from None
        return target
    if private and not info.private:
        raise PublishingError(
            f"{repo_id} is public, and stays so: --private is for new repositories. "
            "Change it in its settings first, or choose another name."
        )
    if revision not in (None, constants.DEFAULT_REVISION):
        try:
            branch = api.repo_info(repo_id, revision=revision)
        except RevisionNotFoundError:
            target.is_new_branch = True
        else:
            # A branch that is where main is was made and not committed to: an upload was interrupted there.
            target.is_new_branch, info = branch.sha == info.sha, branch
    target.start, target.files = info.sha, [sibling.rfilename for sibling in info.siblings]
    replaced = [name for name in target.files if name != KEPT]
    if replaced and not replace and not create_pr and not target.is_new_branch:
        raise PublishingError(
            f"{repo_id} holds {len(replaced)} files on {revision or constants.DEFAULT_REVISION}: "
            f"{', '.join(replaced[:5])}"
            f"{', ...' if len(replaced) > 5 else ''}. "
            "Say --yes to put the bundle in their place (its history keeps them), --create-pr to propose it, "
            "or --revision for a branch of its own."
        )
    return target


def push(api: HfApi, folder: Path, names: list[str], target: Target, message: str, private: bool = False) -> str:
    """
    Make the target hold the files `names` of the folder and nothing else, in one commit; returns that commit's URL, or
    the pull request's.

    Raises:
        PublishingError: the Hub does not take the card, or what is at the target afterwards is not what was sent.
        HfHubHTTPError: the Hub refused. The target is as it was; once more does what is left.
    """
    validate_card(api, folder / "README.md")  # before anything is made
    if target.start is None:
        api.create_repo(target.repo_id, private=private, exist_ok=True)
        target.start = api.repo_info(target.repo_id).sha
        if target.revision not in (None, constants.DEFAULT_REVISION):
            target.is_new_branch = True
    revision = None if target.create_pr else target.revision
    additions = [CommitOperationAdd(name, str(folder / name)) for name in names]
    deletions = [CommitOperationDelete(name) for name in target.files if name not in names and name != KEPT]
    start = None if target.is_new_branch else revision
    api.preupload_lfs_files(target.repo_id, additions, revision=start, create_pr=target.create_pr)
    if target.is_new_branch:  # late, so that it is not seen without its files for long
        api.create_branch(target.repo_id, branch=revision, revision=target.start, exist_ok=True)
    commit = api.create_commit(
        target.repo_id,
        deletions + additions,
        commit_message=message,
        revision=revision,
        create_pr=target.create_pr,
        parent_commit=target.start,
    )
    compare(api, target.repo_id, commit.oid, folder, names)
    return commit.pr_url or commit.commit_url


def validate_card(api: HfApi, card: Path) -> None:
    """
    Ask the Hub whether it takes a card's metadata. (`ModelCard.validate` asks huggingface.co whatever HF_ENDPOINT
    says, before `huggingface_hub` 2.)

    Raises:
        PublishingError: the Hub's objections.
    """
    content = {"repoType": "model", "content": card.read_text(encoding="utf-8")}
    response = get_session().post(f"{api.endpoint}/api/validate-yaml", json=content)
    if response.status_code == 400:
        errors = "; ".join(error["message"] for error in response.json()["errors"])
        raise PublishingError(f"The Hub does not take the front matter of {card}: {errors}. Nothing was sent.")
    hf_raise_for_status(response)


def compare(api: HfApi, repo_id: str, commit: str, folder: Path, names: list[str]) -> None:
    """
    Compare a commit's files with local ones, by size and hash.

    Raises:
        PublishingError: names those that differ, lack or are too many.
    """
    found = api.verify_repo_checksums(repo_id, revision=commit, local_dir=folder)
    sizes = {info.path: info.size for info in api.get_paths_info(repo_id, names, revision=commit)}
    faults = [
        f"{file['path']} has {file['algorithm']} {file['expected']}, not {file['actual']}" for file in found.mismatches
    ]
    faults += [
        f"{name} has {sizes[name]} bytes"
        for name in names
        if sizes.get(name, size := (folder / name).stat().st_size) != size
    ]
    faults += [f"{name} did not arrive" for name in found.extra_paths]
    faults += [f"{name} is there and was not sent" for name in found.missing_paths if name != KEPT]
    if faults:
        raise PublishingError(
            f"{repo_id} at {commit} is not what was sent: {'; '.join(faults)}. Do not use it; upload once more."
        )
