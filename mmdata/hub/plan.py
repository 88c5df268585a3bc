"""What `mm fetch` has to do: names in, one item a file out, with its content, where it is and what is here already.

Each repository is listed at most once at each revision, and not at all when the lock and the folder say everything is there.
Locked files keep the commit and content of mm.lock; `update` moves them. A file that is neither as recorded nor as published is
the user's own and is left alone.
"""

import contextlib
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from mmdata.errors import AccessError, ConflictError, MMError, NotFoundError, UsageError
from mmdata.hub import catalog
from mmdata.hub.catalog import KnownFile
from mmdata.hub.lockfile import LOCK_NAME, Entry, read_lock, same_mtime, same_stat
from mmdata.hub.sources import Listing, Repo, commits, first_bytes, is_safe, list_files, look_up, open_source
from mmdata.hub.transfer import Content, Patience, kept_bytes
from mmdata.io.files import Digest, digest_file

TOKENIZER_DIR = "tokenizer"

Checking = Callable[[str, int, int], None]  # (name, bytes hashed, of bytes)


@dataclass(frozen=True, slots=True)
class Options:
    """How to fetch; the defaults are those of the command."""

    out: Path = Path("data")
    source: str = "hf"
    endpoint: str | None = None
    revision: str | None = None
    update: bool = False
    verify: bool = False
    force: bool = False
    connections: int = 1
    patience: Patience = field(default_factory=Patience)


@dataclass(frozen=True, slots=True)
class Want:
    """One file that is asked for: its name here, its path there, and what the catalog knows about it."""

    name: str
    path: str
    repo: Repo
    stage: str = ""
    known: KnownFile | None = None
    revision: str | None = None  # pinned by the catalog
    is_optional: bool = False  # left alone, with a note, where it would be in the way


@dataclass(frozen=True, slots=True)
class Item:
    """What there is to do about one file. `state`: have, part, stale, missing; `action`: keep, adopt, get, fail."""

    want: Want
    state: str
    action: str
    content: Content | None = None
    revision: str = ""
    commit: str = ""
    path: str = ""
    have_bytes: int = 0
    found: Digest | None = None
    error: MMError | None = None

    @property
    def get_bytes(self) -> int:
        """Bytes still to come."""
        return self.content.num_bytes - self.have_bytes if self.action == "get" and self.content else 0


@dataclass(frozen=True, slots=True)
class Plan:
    """What `fetch` will do, what there is to say about it, and the bytes free where it will be done."""

    options: Options
    items: tuple[Item, ...]
    warnings: tuple[str, ...]
    free_bytes: int

    @property
    def get_bytes(self) -> int:
        """Bytes to download in all."""
        return sum(item.get_bytes for item in self.items)


def plan(
    names: tuple[str, ...] = (),
    *,
    options: Options,
    preset: str | None = None,
    everything: bool = False,
    tokenizer: str | None = None,
    checking: Checking | None = None,
) -> Plan:
    """What to do to have the named files (stages' names, file names, globs), a preset, or everything the main branch holds.

    Without any of them: what one needs to begin, or with `verify` all that was ever fetched.
    """
    if preset is not None and preset not in catalog.PRESETS:
        raise UsageError(f"no preset {preset!r}", f"one of {', '.join(catalog.PRESETS)}")
    planner = _Planner(options, checking)
    planner.only_model = tokenizer is not None and not (names or preset or everything)
    if not names and not everything and tokenizer is None and preset is None:
        if options.verify and planner.lock.files:
            names = tuple(planner.lock.files)
        else:
            preset = "begin"
    wants = [want for name in (*catalog.PRESETS.get(preset or "", ()), *names) for want in planner.wants(name)]
    wants += planner.everything() if everything else []
    if tokenizer or preset:
        wants += planner.tokenizer(tokenizer or catalog.PRESET_TOKENIZER[preset or "begin"], is_asked=bool(tokenizer))
    unique = {want.name: want for want in wants}
    items = tuple(planner.item(want) for want in unique.values())
    return Plan(options, items, tuple(planner.warnings), shutil.disk_usage(_nearest_dir(options.out)).free)


class _Planner:
    """Holds what planning learns: the lock, listings already asked for, warnings."""

    def __init__(self, options: Options, checking: Checking | None) -> None:
        self.options, self.checking = options, checking
        self.source = open_source(options.source, options.endpoint, options.patience)
        self.lock = read_lock(options.out)
        self.warnings = [self.lock.warning] if self.lock.warning else []
        self.dataset = Repo(catalog.DATASET_REPO.get(self.source.kind, ""))
        self.only_model = False  # only then is --revision one of the tokenizer's repository
        self.main = "master" if self.source.kind == "modelscope" else "main"
        self._listings: dict[tuple[Repo, str], Listing | NotFoundError] = {}
        self._commits: dict[Repo, list[str]] = {}

    # names

    def wants(self, name: str) -> list[Want]:
        """The files a name or a glob means. Raises NotFoundError with the nearest names, UsageError for a hostile one."""
        if catalog.is_glob(name):
            found = [self._known(known) for known in catalog.find_glob(name)]
            if not found and self._is_repository:
                files = self.listing(self.dataset, self.options.revision or self._locked_commit() or self.main).files
                fitting = [path for path in files if Path(path).match(name)]
                found = [self._unknown(path) for path in fitting]
            if not found:
                raise NotFoundError(f"nothing fits {name!r}", "`mm fetch --list` shows the known names")
            return found
        if not is_safe(name) or _is_ours(name):
            raise UsageError(
                f"{name!r} is no name of a file in a repository", "`mm fetch --list` shows the known names"
            )
        if name in self.lock.files and self.lock.files[name].repo_kind == "model":
            entry = self.lock.files[name]
            return [Want(name, entry.path, Repo(entry.repo, "model"), TOKENIZER_DIR)]
        known = catalog.find(name)
        return [self._known(known) if known else self._unknown(name)]

    def _known(self, known: KnownFile) -> Want:
        return Want(known.name, known.path, self.dataset, known.stage, known, known.revisions.get(self.source.kind))

    def _unknown(self, path: str) -> Want:
        return Want(path, path, self.dataset)

    def everything(self) -> list[Want]:
        """All files of the revision asked for, else of the main branch; names that would leave the folder are refused."""
        if not self._is_repository:
            raise UsageError("--all needs a repository to list", "name the files, or use --source hf or modelscope")
        listing = self.listing(self.dataset, self.options.revision or self._locked_commit() or self.main)
        wants = []
        for path in listing.files:
            if not is_safe(path) or _is_ours(path):
                self.warnings.append(f"refused the name {path!r}: it would be written outside {self.options.out}")
            elif not Path(path).name.startswith("."):
                known = next((known for known in catalog.FILES if known.name == path == known.path), None)
                wants.append(self._known(known) if known else self._unknown(path))
        return wants

    def tokenizer(self, name: str, *, is_asked: bool) -> list[Want]:
        """The files of a known tokenizer. One that only comes along with a preset never replaces another."""
        known = catalog.find_tokenizer(name)
        if known is None:
            raise UsageError(f"no tokenizer {name!r}", f"one of {', '.join(t.name for t in catalog.TOKENIZERS)}")
        repo = Repo(known.repo.get(self.source.kind, known.repo["hf"]), "model")
        there = {key: entry for key, entry in self.lock.files.items() if entry.repo_kind == "model"}
        others = {entry.repo for entry in there.values()} - set(known.repo.values())
        if others and not is_asked:
            self.warnings.append(f"{self.options.out / TOKENIZER_DIR} holds the tokenizer of {min(others)}: it stays")
            return []
        if others and not (self.options.update or self.options.force):
            where = self.options.out / TOKENIZER_DIR
            raise ConflictError(
                f"{where} holds the tokenizer of {min(others)}", "`--force` replaces it; or use another --out"
            )
        if there and not others and not self.options.update:
            paths = [key.removeprefix(f"{TOKENIZER_DIR}/") for key in there]
        else:
            paths = [*catalog.TOKENIZER_FILES, *self._extras(repo, known.revision)]
        prefix = "" if self._is_repository else f"{TOKENIZER_DIR}/"
        revision = known.revision if self.source.kind == "hf" else None
        return [
            Want(
                f"{TOKENIZER_DIR}/{path}", prefix + path, repo, TOKENIZER_DIR, None, revision, is_optional=not is_asked
            )
            for path in paths
        ]

    def _extras(self, repo: Repo, revision: str | None) -> list[str]:
        if not self._is_repository:
            return [path for path in catalog.TOKENIZER_EXTRAS if look_up(self.source, f"{TOKENIZER_DIR}/{path}")]
        with contextlib.suppress(NotFoundError, AccessError):  # said where the files themselves are looked for
            for candidate in self._revisions(repo, revision if self.source.kind == "hf" else None):
                listing = self._try_listing(repo, candidate)
                if listing and catalog.TOKENIZER_FILES[0] in listing.files:
                    return [path for path in catalog.TOKENIZER_EXTRAS if path in listing.files]
        return []

    # one file

    def item(self, want: Want) -> Item:
        """What to do about one file. Errors of this file alone come back in the item; a name nobody knows is raised."""
        try:
            return self._item(want)
        except ConflictError as error:
            if want.is_optional:
                self.warnings.append(f"{error.message}: it stays")
                return Item(want, "have", "keep")
            return Item(want, "stale", "fail", error=error)
        except NotFoundError as error:
            if want.known is None and not want.is_optional:
                raise
            return Item(want, "missing", "fail", error=error)
        except AccessError as error:
            if not want.is_optional:
                raise
            return Item(want, "missing", "fail", error=error)

    def _item(self, want: Want) -> Item:
        options, path = self.options, self.options.out / want.name
        entry = self.lock.files.get(want.name)
        is_other = entry is not None and entry.repo_kind == "model" and _base(entry.repo) != _base(want.repo.id)
        asked = self._asked(want.repo)
        if entry and not is_other and not options.update and asked in (None, entry.revision, entry.commit):
            content = Content(entry.num_bytes, entry.sha256, first=first_bytes(want.name))
            item = Item(want, "", "", content, entry.revision, entry.commit, entry.path)
            judged = self._judge(item, path, entry)
            is_pinned = not self._is_repository or re.fullmatch(r"[0-9a-f]{7,}", entry.commit)
            if judged.action == "get" and not (
                (entry.source, entry.repo) == (self.source.kind, want.repo.id) and is_pinned
            ):
                judged = replace(
                    self._locate(want, content), state=judged.state, action="get", have_bytes=judged.have_bytes
                )
            return judged
        return self._judge(self._locate(want), path, entry)

    def _judge(self, item: Item, path: Path, entry: Entry | None) -> Item:
        """Compare what is on disk with what should be there. Raises ConflictError for a file of the user's own."""
        content = item.content
        assert content is not None
        if not path.exists():
            have = min(kept_bytes(path, content), content.num_bytes)
            return replace(item, state="part" if have else "missing", action="get", have_bytes=have)
        if path.is_dir():
            raise ConflictError(f"{path} is a folder", "move it away")
        if entry and not self.options.verify and same_stat(path, entry) and content.sha256:
            is_same = content.sha256 == entry.sha256
            return replace(item, state="have" if is_same else "stale", action="keep" if is_same else "get")
        report = (lambda done, total: self.checking(item.want.name, done, total)) if self.checking else None  # type: ignore[misc]
        found = digest_file(path, with_git=bool(content.git_oid), progress=report)
        is_recorded = entry is not None and found.sha256 == entry.sha256
        if not content.mismatch(found) and (content.is_published or is_recorded):
            return replace(item, state="have", action="adopt", found=found)
        if entry and not is_recorded and same_mtime(path, entry):
            self.warnings.append(
                f"{path} is damaged on disk (not what was fetched, and not edited): it is fetched again"
            )
        elif not is_recorded and not self.options.force:
            raise ConflictError(
                f"{path} is not what was fetched or published: it looks like your own",
                "move it away, or replace it: --force",
            )
        return replace(item, state="stale", action="get", have_bytes=min(kept_bytes(path, content), content.num_bytes))

    # where it is

    @property
    def _is_repository(self) -> bool:
        return self.source.kind in ("hf", "modelscope")

    def _locate(self, want: Want, locked: Content | None = None) -> Item:
        """Find a file at the source: at the revision asked for, where the lock and the catalog say, on main, in the history."""
        if not self._is_repository:
            return self._locate_plain(want, locked)
        nearby: list[str] = []
        for revision in self._revisions(want.repo, want.revision):
            listing = self._try_listing(want.repo, revision)
            if listing is None:
                continue
            nearby += listing.files
            if content := self._accept(want, listing, locked):
                return Item(want, "", "", content, revision, listing.commit, want.path)
        may_search = self.source.kind == "hf" and self._asked(want.repo) is None and want.repo.kind == "dataset"
        if may_search and (found := self._search_history(want, locked)):
            return found
        raise self._nowhere(want, nearby, is_locked=locked is not None)

    def _nowhere(self, want: Want, nearby: list[str], *, is_locked: bool) -> NotFoundError:
        failed = [value for value in self._listings.values() if isinstance(value, NotFoundError)]
        if failed and not nearby:
            return failed[-1]
        if is_locked:
            return NotFoundError(
                f"{want.repo.id} no longer has the {want.path} that {LOCK_NAME} names", "`--update` takes the newest"
            )
        where = f"{want.repo.id}{f' at {self.options.revision}' if self.options.revision else ''}"
        close = [name for name in catalog.nearest(want.path, tuple(nearby)) if name != want.path]
        fix = f"did you mean {', '.join(close)}?" if close else "`mm fetch --list` shows the known names"
        if want.known:
            fix = (
                "leave --revision out"
                if self._asked(want.repo)
                else "try another --source; its history was searched too"
            )
        return NotFoundError(f"{where} has no {want.path}", fix)

    def _locate_plain(self, want: Want, locked: Content | None) -> Item:
        for path in dict.fromkeys((want.path, want.name)):
            content = look_up(self.source, path)
            if content is None:
                continue
            known = want.known
            if locked and content.num_bytes == locked.num_bytes:
                content = locked
            elif known and known.sha256 and len(known.sha256) == 64 and content.num_bytes == known.num_bytes:
                content = replace(content, sha256=known.sha256)
            elif known and not catalog.fits(known, content.num_bytes, content.sha256):
                self._differs(want, content)
            if not content.is_published:
                self.warnings.append(f"{want.name}: nobody published a checksum for it, so it arrives unverified")
            return Item(want, "", "", content, self.source.endpoint, "", path)
        raise NotFoundError(f"{self.source.endpoint} has no {want.path}", "check --source, or leave it out")

    def _revisions(self, repo: Repo, pinned: str | None) -> list[str]:
        if asked := self._asked(repo):
            return [self._full(repo, asked)]
        order = [self.main, pinned] if self.options.update else [self._locked_commit(repo), pinned, self.main]
        return list(dict.fromkeys(self._full(repo, revision) for revision in order if revision))

    def _asked(self, repo: Repo) -> str | None:
        """The revision the user asked for, where it is one of this repository's."""
        return self.options.revision if repo.kind == "dataset" or self.only_model else None

    def _full(self, repo: Repo, revision: str) -> str:
        """The whole commit id for its first digits, which the Hub does not take."""
        if self.source.kind == "hf" and re.fullmatch(r"[0-9a-f]{7,39}", revision):
            return next((commit for commit in self._history(repo) if commit.startswith(revision)), revision)
        return revision

    def _history(self, repo: Repo) -> list[str]:
        if repo not in self._commits:
            try:
                self._commits[repo] = commits(self.source, repo)
            except NotFoundError:
                self._commits[repo] = []
        return self._commits[repo]

    def _locked_commit(self, repo: Repo | None = None) -> str | None:
        repo = repo or self.dataset
        entries = [
            e
            for e in self.lock.files.values()
            if (e.repo, e.source, e.repo_kind) == (repo.id, self.source.kind, repo.kind)
        ]
        return Counter(e.commit for e in entries).most_common(1)[0][0] if entries else None

    def listing(self, repo: Repo, revision: str) -> Listing:
        """A listing, asked for once. Raises NotFoundError."""
        key = (repo, revision)
        if key not in self._listings:
            try:
                self._listings[key] = list_files(self.source, repo, revision)
            except NotFoundError as error:
                self._listings[key] = error
        found = self._listings[key]
        if isinstance(found, NotFoundError):
            raise found
        return found

    def _try_listing(self, repo: Repo, revision: str) -> Listing | None:
        try:
            return self.listing(repo, revision)
        except NotFoundError:
            if self._asked(repo):
                raise
            return None

    def _accept(self, want: Want, listing: Listing, locked: Content | None) -> Content | None:
        """The file's content in a listing, unless it is a namesake or, for a locked file, other bytes."""
        content = listing.files.get(want.path)
        if content is None:
            return None
        if locked:
            same = content.num_bytes == locked.num_bytes and content.sha256 in (None, locked.sha256)
            return locked if same else None
        if (
            want.known
            and not self.options.revision
            and catalog.is_namesake(want.known, content.num_bytes, content.sha256)
        ):
            return None
        if want.known and not catalog.fits(want.known, content.num_bytes, content.sha256):
            self._differs(want, content)
        return content

    def _differs(self, want: Want, content: Content) -> None:
        known = want.known
        assert known is not None
        self.warnings.append(
            f"{want.name}: the source lists {content.num_bytes:,} bytes, sha256 {(content.sha256 or 'unknown')[:12]}; the catalog knows "
            f"{known.size_bytes or 0:,} bytes, sha256 {(known.sha256 or 'unknown')[:12]}: the source is believed"
        )

    def _search_history(self, want: Want, locked: Content | None) -> Item | None:
        """The newest commit that still has the file."""
        for commit in self._history(want.repo):
            listing = self._try_listing(want.repo, commit)
            if listing and (content := self._accept(want, listing, locked)):
                self.warnings.append(
                    f"{want.path} is gone from {self.main}; commit {commit[:12]} is the last that has it"
                )
                return Item(want, "", "", content, commit, commit, want.path)
        return None


def _base(repo: str) -> str:
    """A repository's name without its owner, who differs between sources."""
    return repo.rpartition("/")[2]


def _is_ours(name: str) -> bool:
    base = Path(name).name
    return base in (LOCK_NAME, f"{LOCK_NAME}.broken") or base.endswith((".part", ".part.json", ".lock", ".new"))


def _nearest_dir(path: Path) -> Path:
    """The folder itself, or the first of its parents that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
