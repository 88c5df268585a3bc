"""Deciding what `mm fetch` has to do for each file: the content it should have, where to get it, what is on disk.

Each repository is listed at most once per revision, and not at all if mm.lock and the files on disk show that
everything is there. Files recorded in mm.lock keep the recorded commit and content until `--update`. A file on disk
that is neither the recorded nor the published one is taken for the user's own and is not overwritten without `--force`.
mm.lock is meant to be put under version control: on another machine, the same names then bring the same bytes. A file
whose size and times are as recorded counts as complete without being read; others are hashed (about 0.6 GB/s).
"""

import contextlib
import fnmatch
import re
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from mmdata.errors import AccessError, ConflictError, MMError, NotFoundError, UsageError
from mmdata.hub import catalog
from mmdata.hub.catalog import KnownFile
from mmdata.hub.lockfile import LOCK_NAME, LockEntry, read_lock, same_mtime, same_stat
from mmdata.hub.options import FetchOptions
from mmdata.hub.partial import Content, kept_bytes
from mmdata.hub.sources import Listing, Repo, commits, first_bytes, is_safe, list_files, look_up, open_source
from mmdata.hub.transfer import RetryPolicy
from mmdata.io.files import Digest, Progress, digest_file, no_progress

TOKENIZER_DIR = "tokenizer"
SHOW_NAMES = "`mm fetch --list` shows the known names"


@dataclass(frozen=True, slots=True)
class WantedFile:
    """A requested file. `name`: path in the output directory. `path`: in the repository. `known`: catalog entry."""

    name: str
    path: str
    repo: Repo
    stage: str = ""
    known: KnownFile | None = None
    revision: str | None = None  # the one that the catalog names
    is_optional: bool = False  # implied by a preset: if another file is in its place, that one stays, with a warning


@dataclass(frozen=True, slots=True)
class FetchItem:
    """The decision about one file. `state` is what is on disk: have (the right content), part (a partial download),
    stale (another content) or missing. `action` is keep, adopt (only record it in mm.lock), get (download) or fail (see
    `error`). `content`: the content to have, found by `revision`, `commit` and `path`. `have_bytes` were downloaded by
    an earlier run."""

    want: WantedFile
    state: str = ""
    action: str = ""
    content: Content | None = None
    revision: str = ""
    commit: str = ""
    path: str = ""
    have_bytes: int = 0
    digest: Digest | None = None  # of the file on disk, if it was hashed and is right
    error: MMError | None = None

    @property
    def get_bytes(self) -> int:
        return self.content.num_bytes - self.have_bytes if self.action == "get" and self.content else 0


@dataclass(frozen=True, slots=True)
class FetchPlan:
    """What `fetch` will do: an item per file, warnings for the user, and the free bytes of the output disk."""

    options: FetchOptions
    items: tuple[FetchItem, ...]
    warnings: tuple[str, ...]
    free_bytes: int

    @property
    def get_bytes(self) -> int:
        return sum(item.get_bytes for item in self.items)


def plan(names: tuple[str, ...], options: FetchOptions, progress: Progress = no_progress) -> FetchPlan:
    """Decide what to do so that the requested files are complete in `options.out`. May list repositories.

    names: catalog keys, file names, shell patterns, or other datasets as OWNER/NAME, to which the files of the options
    `preset`, `everything` and `tokenizer` are added. If none of them is given, the preset "begin" is taken, or with `options.verify` every file in
    mm.lock. progress: called while a file is hashed. Raises UsageError for an unknown preset or tokenizer,
    NotFoundError for an unknown name, and AccessError, NetworkError or ConflictError where nothing can be planned.
    """
    preset, tokenizer = options.preset, options.tokenizer
    if preset is not None and preset not in catalog.PRESETS:
        raise UsageError(f"no preset {preset!r}", f"one of {', '.join(catalog.PRESETS)}")
    planner = _Planner(options, progress)
    if options.file and not names:
        raise UsageError("--file needs a dataset", "mm fetch OWNER/DATASET --file PATH")
    planner.only_model = tokenizer is not None and not (names or preset or options.everything)
    if not names and not options.everything and tokenizer is None and preset is None:
        if options.verify and planner.lock.files:
            names = tuple(planner.lock.files)
        else:
            preset = "begin"
    wants = [want for name in (*catalog.PRESETS.get(preset or "", ()), *names) for want in planner.wants(name)]
    wants += planner.everything() if options.everything else []
    if tokenizer or preset:
        wants += planner.tokenizer(tokenizer or catalog.PRESET_TOKENIZER[preset or "begin"], is_asked=bool(tokenizer))
    unique = {want.name: want for want in wants}
    items = tuple(planner.item(want) for want in unique.values())
    folder = next(folder for folder in (options.out.absolute(), *options.out.absolute().parents) if folder.is_dir())
    return FetchPlan(options, items, tuple(planner.warnings), shutil.disk_usage(folder).free)


class _Planner:
    """The state of planning: the content of mm.lock, the warnings, and the listings and histories requested so far."""

    def __init__(self, options: FetchOptions, progress: Progress) -> None:
        self.options, self.progress = options, progress
        self.source = open_source(options.source, options.endpoint, options.retry or RetryPolicy())
        self.warnings: list[str] = []
        self.lock = read_lock(options.out, self.warnings)
        self.dataset = Repo(catalog.DATASET_REPO.get(self.source.kind, ""))
        self.only_model = False  # only a tokenizer is requested, so that --revision is a revision of its repository
        self.main = "master" if self.source.kind == "modelscope" else "main"
        self._listings: dict[tuple[Repo, str], Listing | NotFoundError] = {}
        self._commits: dict[Repo, list[str]] = {}

    # --- names

    def wants(self, name: str) -> list[WantedFile]:
        """Return the files that a name or shell pattern means. A pattern is matched with the catalog and, if nothing
        there matches, with the repository. Raises NotFoundError if it matches nothing, and UsageError for a path
        outside the output directory or a name that `mm fetch` uses."""
        if set(name) & set("*?["):
            wants = [self._wanted(known.path, known) for known in catalog.find_glob(name)]
            if not wants and self._is_repository:
                wants = [self._wanted(path) for path in self._dataset_files() if Path(path).match(name)]
            if not wants:
                raise NotFoundError(f"nothing fits {name!r}", SHOW_NAMES)
            return wants
        if not is_safe(name) or _is_ours(name):
            raise UsageError(f"{name!r} is no name of a file in a repository", SHOW_NAMES)
        entry = self.lock.files.get(name)
        if entry and entry.repo_kind == "model":
            return [WantedFile(name, entry.path, Repo(entry.repo, "model"), TOKENIZER_DIR)]
        if entry and name == f"{entry.repo}/{entry.path}":
            return [WantedFile(name, entry.path, Repo(entry.repo))]
        if self.options.file or (re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not re.search(r"\.[a-z]\w*$", name)):
            return self.repository(name)
        known = catalog.find(name)
        return [self._wanted(known.path if known else name, known)]

    def _wanted(self, path: str, known: KnownFile | None = None) -> WantedFile:
        if known is None:
            return WantedFile(path, path, self.dataset)
        return WantedFile(known.name, path, self.dataset, known.stage, known, known.revisions.get(self.source.kind))

    def repository(self, name: str) -> list[WantedFile]:
        """Return the data files of another dataset repository, OWNER/NAME, or those that `options.file` names. They are
        saved below OWNER/NAME in the output directory. Raises UsageError for a source without repositories, and
        NotFoundError if a pattern matches nothing."""
        if not self._is_repository or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise UsageError(f"{name} is no repository", "name it OWNER/DATASET, with --source hf or modelscope")
        repo = Repo(name)
        try:
            files = self.listing(repo, self.options.revision or self._locked_commit(repo) or self.main).files
        except NotFoundError as error:
            raise NotFoundError(error.message, f"check the name; {SHOW_NAMES}") from error
        chosen = [path for path in files if catalog.holds_rows(path)]
        if self.options.file:
            matched = {pattern: fnmatch.filter(files, pattern) for pattern in self.options.file}
            for pattern in (pattern for pattern, paths in matched.items() if not paths):
                raise NotFoundError(f"{name} has no {pattern}", f"it has {', '.join([*files][:20])}")
            chosen = [path for paths in matched.values() for path in paths]
        if not chosen:
            raise NotFoundError(
                f"{name} has no file with rows", f"name one: --file PATH; it has {', '.join([*files][:20])}"
            )
        return [WantedFile(f"{name}/{path}", path, repo) for path in chosen if is_safe(path)]

    def _dataset_files(self) -> dict[str, Content]:
        """Return the files of the dataset repository at `--revision`, else the locked commit, else the main branch."""
        return self.listing(self.dataset, self.options.revision or self._locked_commit() or self.main).files

    def everything(self) -> list[WantedFile]:
        """Return all files of the dataset repository except hidden ones, and with a warning those outside the output
        directory or named like `mm fetch`'s own. Raises UsageError without a repository."""
        if not self._is_repository:
            raise UsageError("--all needs a repository to list", "name the files, or use --source hf or modelscope")
        wants = []
        for path in self._dataset_files():
            if not is_safe(path) or _is_ours(path):
                self.warnings.append(f"refused the name {path!r}: it would be written outside {self.options.out}")
            elif not Path(path).name.startswith("."):
                known = next((known for known in catalog.FILES if known.name == path == known.path), None)
                wants.append(self._wanted(path, known))
        return wants

    def tokenizer(self, name: str, *, is_asked: bool) -> list[WantedFile]:
        """Return the files of a tokenizer of the catalog. Raises UsageError for an unknown name. is_asked: the user
        named it. If the output directory has a tokenizer of another repository, one implied by a preset gives a warning
        and no files; a named one raises ConflictError without `--update` or `--force`. A tokenizer that is whole in
        mm.lock keeps its list of files unless `--update` is given. TOKENIZER_FILES are the last: see `fetch`."""
        known = catalog.TOKENIZERS.get(name)
        if known is None:
            raise UsageError(f"no tokenizer {name!r}", f"one of {', '.join(catalog.TOKENIZERS)}")
        where = self.options.out / TOKENIZER_DIR
        repo = Repo(known.repo.get(self.source.kind, known.repo["hf"]), "model")
        there = {key: entry for key, entry in self.lock.files.items() if entry.repo_kind == "model"}
        others = {entry.repo for entry in there.values()} - set(known.repo.values())
        if others and not is_asked:
            self.warnings.append(f"{where} holds the tokenizer of {min(others)}: it stays")
            return []
        if others and not (self.options.update or self.options.force):
            problem = f"{where} holds the tokenizer of {min(others)}"
            raise ConflictError(problem, "`--force` replaces it; or use another --out")
        paths = [key.removeprefix(f"{TOKENIZER_DIR}/") for key in there]
        if others or self.options.update or not {*catalog.TOKENIZER_FILES} <= {*paths}:
            paths = [*self._extras(repo, known.revision), *catalog.TOKENIZER_FILES]
        prefix = "" if self._is_repository else f"{TOKENIZER_DIR}/"
        revision = known.revision if self.source.kind == "hf" else None
        base = WantedFile("", "", repo, TOKENIZER_DIR, None, revision, is_optional=not is_asked)
        return [replace(base, name=f"{TOKENIZER_DIR}/{path}", path=prefix + path) for path in paths]

    def _extras(self, repo: Repo, revision: str | None) -> list[str]:
        """Return the optional files (chat_template.jinja …) that the source has; none if it cannot be listed."""
        if not self._is_repository:
            return [path for path in catalog.TOKENIZER_EXTRAS if look_up(self.source, f"{TOKENIZER_DIR}/{path}")]
        with contextlib.suppress(NotFoundError, AccessError):  # reported when the files themselves are located
            for candidate in self._revisions(repo, revision if self.source.kind == "hf" else None):
                listing = self._try_listing(repo, candidate)
                if listing and catalog.TOKENIZER_FILES[0] in listing.files:
                    return [path for path in catalog.TOKENIZER_EXTRAS if path in listing.files]
        return []

    # --- one file

    def item(self, want: WantedFile) -> FetchItem:
        """Decide what to do about one file. Records in the item: ConflictError, and NotFoundError if the catalog knows
        the file. For an optional file AccessError and NotFoundError are recorded too, and a conflict only gives a
        warning."""
        try:
            return self._item(want)
        except ConflictError as error:
            if want.is_optional:
                self.warnings.append(f"{error.message}: it stays")
                return FetchItem(want, "have", "keep")
            return FetchItem(want, "stale", "fail", error=error)
        except (NotFoundError, AccessError) as error:
            is_known = want.known is not None and isinstance(error, NotFoundError)
            if not is_known and not want.is_optional:
                raise
            return FetchItem(want, "missing", "fail", error=error)

    def _item(self, want: WantedFile) -> FetchItem:
        """Decide what to do about one file; errors are raised. Unless `--update` or another revision is asked for, the
        content in mm.lock is the one to have, and the source is asked only if a download cannot use the recorded
        place."""
        options, path = self.options, self.options.out / want.name
        entry = self.lock.files.get(want.name)
        # The owner of a repository differs between sources.
        is_other = bool(entry) and entry.repo_kind == "model" and Path(entry.repo).name != Path(want.repo.id).name
        asked = self._asked(want.repo)
        if entry and not is_other and not options.update and asked in (None, entry.revision, entry.commit):
            content = Content(entry.num_bytes, entry.sha256, first=first_bytes(want.name))
            item = FetchItem(want, "", "", content, entry.revision, entry.commit, entry.path)
            item = self._compare(item, path, entry)
            is_pinned = not self._is_repository or re.fullmatch(r"[0-9a-f]{7,}", entry.commit)
            is_same_place = (entry.source, entry.repo) == (self.source.kind, want.repo.id)
            if item.action == "get" and not (is_same_place and is_pinned):
                place = self._locate(want, content)
                item = replace(place, state=item.state, action="get", have_bytes=item.have_bytes)
            return item
        return self._compare(self._locate(want), path, entry)

    def _compare(self, item: FetchItem, path: Path, entry: LockEntry | None) -> FetchItem:
        """Return the item with state and action, by comparing the file on disk, hashed if necessary, with
        `item.content`. Raises ConflictError for a directory and, without `--force`, for a file with neither the
        recorded nor the published content. Other bytes with the recorded mtime are damage: downloaded again, with a
        warning."""
        content = item.content
        assert content is not None
        have = min(kept_bytes(path, content), content.num_bytes)
        if not path.exists():
            return replace(item, state="part" if have else "missing", action="get", have_bytes=have)
        if path.is_dir():
            raise ConflictError(f"{path} is a folder", "move it away")
        if entry and not self.options.verify and same_stat(path, entry) and content.sha256:
            is_same = content.sha256 == entry.sha256
            return replace(item, state="have" if is_same else "stale", action="keep" if is_same else "get")
        digest = digest_file(path, with_git=bool(content.git_oid), progress=self.progress)
        is_recorded = entry is not None and digest.sha256 == entry.sha256
        if not content.mismatch(digest) and (content.is_published or is_recorded):
            return replace(item, state="have", action="adopt", digest=digest)
        if entry and not is_recorded and same_mtime(path, entry):
            self.warnings.append(f"{path} is damaged on disk (its bytes changed, its times did not): fetched again")
        elif not is_recorded and not self.options.force:
            problem = f"{path} is not what was fetched or published: it looks like your own"
            raise ConflictError(problem, "move it away, or replace it: --force")
        return replace(item, state="stale", action="get", have_bytes=have)

    # --- where it is

    @property
    def _is_repository(self) -> bool:
        """Whether the source is the Hugging Face Hub or ModelScope, whose repositories can be listed."""
        return self.source.kind in ("hf", "modelscope")

    def _locate(self, want: WantedFile, locked: Content | None = None) -> FetchItem:
        """Find a file at the source; return an item with content, revision and commit. locked: the content that it must
        have; None for any. Tries `--revision` alone if given; otherwise the locked commit, the catalog's revision, the
        main branch (with `--update`: the main branch, the catalog's revision), and for datasets on the Hub the commits
        of the main branch. Raises NotFoundError if none has the file."""
        if not self._is_repository:
            return self._locate_plain(want, locked)
        nearby: list[str] = []
        for revision in self._revisions(want.repo, want.revision):
            listing = self._try_listing(want.repo, revision)
            if listing is None:
                continue
            nearby += listing.files
            if content := self._accept(want, listing, locked):
                return FetchItem(want, "", "", content, revision, listing.commit, want.path)
        may_search = self.source.kind == "hf" and self._asked(want.repo) is None and want.repo.kind == "dataset"
        if may_search and (item := self._search_history(want, locked)):
            return item
        raise self._not_found(want, nearby, is_locked=locked is not None)

    def _not_found(self, want: WantedFile, nearby: list[str], *, is_locked: bool) -> NotFoundError:
        """Return the error for a file that no revision has. nearby: listed paths; similar ones are proposed."""
        failed = [value for value in self._listings.values() if isinstance(value, NotFoundError)]
        if failed and not nearby:
            return failed[-1]
        if is_locked:
            problem = f"{want.repo.id} no longer has the {want.path} that {LOCK_NAME} names"
            return NotFoundError(problem, "`--update` takes the newest")
        where = f"{want.repo.id}{f' at {self.options.revision}' if self.options.revision else ''}"
        close = [name for name in catalog.nearest(want.path, tuple(nearby)) if name != want.path]
        fix = f"did you mean {', '.join(close)}?" if close else SHOW_NAMES
        if want.known:
            searched = "try another --source; its history was searched too"
            fix = "leave --revision out" if self._asked(want.repo) else searched
        return NotFoundError(f"{where} has no {want.path}", fix)

    def _locate_plain(self, want: WantedFile, locked: Content | None) -> FetchItem:
        """Find a file in a folder or at a web address, by its repository path or else its local name. The checksum is
        that of mm.lock, the catalog, or the folder's own mm.lock, if the size is the same there; without any, a warning
        is added. Raises NotFoundError if the file is not there."""
        for path in dict.fromkeys((want.path, want.name)):
            content = look_up(self.source, path)
            if content is None:
                continue
            if self.source.kind == "dir":  # the folder may have been filled by `mm fetch` and have its own mm.lock
                folder = Path(self.source.endpoint)
                entry = read_lock(folder).files.get(path)
                if entry and same_stat(folder / path, entry):
                    content = replace(content, sha256=entry.sha256)
            known = want.known
            if locked and content.num_bytes == locked.num_bytes:
                content = locked
            elif known and known.sha256 and len(known.sha256) == 64 and content.num_bytes == known.num_bytes:
                content = replace(content, sha256=known.sha256)
            elif known and not catalog.fits(known, content.num_bytes, content.sha256):
                self._differs(want, content)
            if not content.is_published:
                self.warnings.append(f"{want.name}: nobody published a checksum for it, so it arrives unverified")
            return FetchItem(want, "", "", content, self.source.endpoint, "", path)
        raise NotFoundError(f"{self.source.endpoint} has no {want.path}", "check --source, or leave it out")

    def _revisions(self, repo: Repo, pinned: str | None) -> list[str]:
        """Return the revisions to look for files at, in order. pinned: the one that the catalog names, if any."""
        if asked := self._asked(repo):
            return [self._full(repo, asked)]
        order = [self.main, pinned] if self.options.update else [self._locked_commit(repo), pinned, self.main]
        return list(dict.fromkeys(self._full(repo, revision) for revision in order if revision))

    def _asked(self, repo: Repo) -> str | None:
        """Return `--revision` if it applies: to the dataset, or the tokenizer if only that is requested; else None."""
        return self.options.revision if repo.kind == "dataset" or self.only_model else None

    def _full(self, repo: Repo, revision: str) -> str:
        """Return the full commit id for an abbreviated one, which the Hub does not accept; else `revision`."""
        if self.source.kind == "hf" and re.fullmatch(r"[0-9a-f]{7,39}", revision):
            return next((commit for commit in self._history(repo) if commit.startswith(revision)), revision)
        return revision

    def _history(self, repo: Repo) -> list[str]:
        """Return the commit ids of the main branch, newest first; empty if there is no such repository."""
        if repo not in self._commits:
            try:
                self._commits[repo] = commits(self.source, repo)
            except NotFoundError:
                self._commits[repo] = []
        return self._commits[repo]

    def _locked_commit(self, repo: Repo | None = None) -> str | None:
        """Return the most frequent commit of a repository (default: the dataset) in mm.lock; None if there is none."""
        repo = repo or self.dataset
        wanted = (repo.id, self.source.kind, repo.kind)
        ids = Counter(e.commit for e in self.lock.files.values() if (e.repo, e.source, e.repo_kind) == wanted)
        return ids.most_common(1)[0][0] if ids else None

    def listing(self, repo: Repo, revision: str) -> Listing:
        """Return the files of a repository at a revision, requested once. Raises NotFoundError, each time."""
        key = (repo, revision)
        if key not in self._listings:
            try:
                self._listings[key] = list_files(self.source, repo, revision)
            except NotFoundError as error:
                self._listings[key] = error
        result = self._listings[key]
        if isinstance(result, NotFoundError):
            raise result
        return result

    def _try_listing(self, repo: Repo, revision: str) -> Listing | None:
        """Return the listing. If there is no such revision: None, or NotFoundError if the user named it."""
        try:
            return self.listing(repo, revision)
        except NotFoundError:
            if self._asked(repo):
                raise
            return None

    def _accept(self, want: WantedFile, listing: Listing, locked: Content | None) -> Content | None:
        """Return the content that a listing has for a requested file. None if it has none, if `locked` is given and the
        bytes are others, or if, without `--revision`, the file is another version that the catalog knows by another
        key. Warns if size or checksum differ from the catalog's."""
        content = listing.files.get(want.path)
        if content is None:
            return None
        if locked:
            same = content.num_bytes == locked.num_bytes and content.sha256 in (None, locked.sha256)
            return locked if same else None
        figures = (content.num_bytes, content.sha256)
        if want.known and not self.options.revision and catalog.is_namesake(want.known, *figures):
            return None
        if want.known and not catalog.fits(want.known, *figures):
            self._differs(want, content)
        return content

    def _differs(self, want: WantedFile, content: Content) -> None:
        """Add a warning that the source lists another size or checksum than the catalog."""
        known = want.known
        assert known is not None
        listed = f"{content.num_bytes:,} bytes, sha256 {(content.sha256 or 'unknown')[:12]}"
        cataloged = f"{known.num_bytes or known.about_bytes or 0:,} bytes, sha256 {(known.sha256 or 'unknown')[:12]}"
        self.warnings.append(
            f"{want.name}: the source lists {listed}; the catalog knows {cataloged}: the source is believed"
        )

    def _search_history(self, want: WantedFile, locked: Content | None) -> FetchItem | None:
        """Return the item of the newest commit of the main branch that has the file, with a warning; None without."""
        for commit in self._history(want.repo):
            listing = self._try_listing(want.repo, commit)
            if listing and (content := self._accept(want, listing, locked)):
                last = f"commit {commit[:12]} is the last that has it"
                self.warnings.append(f"{want.path} is gone from {self.main}; {last}")
                return FetchItem(want, "", "", content, commit, commit, want.path)
        return None


def _is_ours(name: str) -> bool:
    """Return whether a file's name is one of `mm fetch`'s own, such as mm.lock or *.part."""
    base = Path(name).name
    ends = (".part", ".part.json", ".lock", ".new", ".partial")
    return base in (LOCK_NAME, f"{LOCK_NAME}.broken") or base.endswith(ends)
