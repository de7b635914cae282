"""What a crash or a restart of the program left behind: which jobs were cut off, which of them can go on here, and what of them
is there already."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dualparal.errors import DualParalError, RequestError
from dualparal.events import BlockReady, Cancelled, Failed, Finished, Interrupted
from dualparal.files import STATE_FOLDER, is_file, is_whole_segment
from dualparal.jobs.claim import claim, is_claimed, wait_for_leftovers
from dualparal.jobs.ending import join_blocks
from dualparal.jobs.folder import JobFolder, finish_deleting, list_jobs
from dualparal.jobs.history import CUT_OFF, fold
from dualparal.media.metadata import describe
from dualparal.options import CHANGES, beside

log = logging.getLogger(__name__)
MAKERS = ("model", "dtype", *CHANGES)  # of a job: with others its bits would be others
MAX_INTERRUPTIONS = 5  # a job that was running whenever the program died may be why it died


def cut_off(outputs: Path) -> Iterator[JobFolder]:
    """Jobs that have not ended and that nobody works on, the oldest first; those that cannot go on are ended here."""
    finish_deleting(outputs)
    folders = list(reversed(list(list_jobs(outputs))))
    wait_for_leftovers(folder for folder in folders if _is_open(folder))
    for folder in folders:
        try:
            final = folder.final_event()
            if isinstance(final, Finished):
                folder.drop_state()  # the program was killed while it did
            if final is not None or is_claimed(folder):
                continue
            held = claim(folder)  # two programs that start at once do not both write
            try:
                if folder.final_event() is not None:  # meanwhile
                    continue
                reason = _record_interruption(folder)
            finally:
                held.release()
        except (DualParalError, OSError) as error:
            log.warning("job %s cannot be recovered: %s", folder.job_id, error, extra={"job_id": folder.job_id})
            continue
        if reason is None:
            yield folder
        else:
            log.warning("job %s is given up: %s", folder.job_id, reason, extra={"job_id": folder.job_id})


def _is_open(folder: JobFolder) -> bool:
    try:
        return folder.final_event() is None
    except DualParalError:
        return False


def _record_interruption(folder: JobFolder) -> str | None:
    """Write down that a running job was cut off; the reason when it will not go on, and then it is ended with it."""
    reason = None
    history = fold(folder.events())
    if folder.record().get("has_tensors"):
        reason = "the program was ended before the job was done, and the tensors it was given are not kept; submit it again"
    if folder.record().get("baseline"):
        reason = "the program was ended before the comparison was done; start it again"
    if history.state == "running":
        worked_s = history.worked_s + max(0.0, _last_saved_s(folder) - history.last_s)
        message = "the program was ended while the job ran"
        folder.append(Interrupted(job_id=folder.job_id, kind=CUT_OFF, message=message, worked_s=worked_s))
        # What was cut off before it was resumed by hand does not count.
        if history.num_cut_off >= MAX_INTERRUPTIONS:
            reason = f"the job was cut off {MAX_INTERRUPTIONS + 1} times; resume it by hand to try again"
    if is_file(folder.stop_wish):
        end_stopped(folder)
        return "it had been asked to stop"
    if reason is not None:
        path, num_frames = join_recorded(folder)
        folder.append(Failed(job_id=folder.job_id, kind="EngineError", message=reason, path=path, num_frames=num_frames))
    return reason


def end_stopped(folder: JobFolder) -> None:
    """End a job that was asked to stop and that nobody but the caller has claimed. Raises `OutputError`, `RequestError`."""
    path, num_frames = join_recorded(folder)
    folder.append(Cancelled(job_id=folder.job_id, path=path, num_frames=num_frames))
    folder.forget_stop()


def _last_saved_s(folder: JobFolder) -> float:
    """When the job saved a sweep for the last time, since the epoch; 0 where it has none."""
    found = 0.0
    for path in (folder.path / STATE_FOLDER).glob("*"):
        with contextlib.suppress(OSError):
            found = max(found, path.stat().st_mtime)
    return found


def check_can_go_on(folder: JobFolder, made_with: Mapping[str, Any], *, anyway: bool = False) -> None:
    """Raise `RequestError` unless an engine whose jobs are `made_with` this model and these options can go on with the job and
    give the bits it would have given; `anyway`: other files of the same names will do."""
    job_id, record = folder.job_id, folder.record()
    if is_claimed(folder):
        raise RequestError(f"job {job_id} is being worked on; wait for it or stop it first", "job_id")
    if isinstance(folder.final_event(), Finished) and _is_playable(folder.video):
        raise RequestError(f"job {job_id} has finished; there is nothing to resume", "job_id")
    if unlike := [name for name in MAKERS if _value(record, name) != _value(made_with, name)]:
        before, now = (", ".join(_shown(name, _value(one, name)) for name in unlike) for one in (record, made_with))
        raise RequestError(
            f"job {job_id} was made with {before}; this engine runs {now}: go on with it in an engine of the same, as "
            f"`python -m dualparal resume {job_id}` does",
            "job_id",
        )
    if (changed := _changed_files(record, made_with)) and not anyway:
        raise RequestError(
            f"job {job_id} was begun with other weights: {', '.join(changed)} of {record['model']} changed since, and the rest "
            "would not fit what is there; submit it anew, or resume it with --anyway",
            "job_id",
        )
    if record.get("baseline"):
        raise RequestError(f"job {job_id} was a comparison, which does not go on; start it again", "job_id")
    if record.get("has_tensors"):
        raise RequestError(f"job {job_id} was given tensors, which are not kept; submit it again", "job_id")


def _value(made_with: Mapping[str, Any], name: str) -> Any:
    """What stands behind `name` of a record, which leaves out what is as the model has it."""
    return made_with.get(name, beside(name)["plain"] if name in CHANGES else None)


def _shown(name: str, value: object) -> str:
    """As visitors may read of it: not where a model lies."""
    value = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
    return f"{name}={(Path(str(value)).name if name == 'model' else value) or 'none'}"


def _changed_files(record: Mapping[str, Any], made_with: Mapping[str, Any]) -> list[str]:
    """Parts and LoRAs that were overwritten in place since the job began. A record of an older version tells of none."""
    before, now = record.get("files", {}), made_with.get("files", {})
    return sorted(name for name in before if name in now and before[name] != now[name])


def _is_playable(video: Path) -> bool:
    """A power cut may leave the end in the journal and a torn video."""
    try:
        return int(describe(video)["num_frames"]) > 0
    except RequestError:
        return False


def warn_of_other_bits(folder: JobFolder, made_with: Mapping[str, Any]) -> None:
    """Log what differs between the engine that began a job and the one that goes on with it, and may change bits."""
    job_id, record = folder.job_id, folder.record()
    if changed := _changed_files(record, made_with):
        log.warning("job %s goes on with other weights than it was begun with (%s)", job_id, ", ".join(changed))
    if record.get("threads") != made_with["threads"]:
        log.warning("job %s was begun with %s threads per process; bits may differ", job_id, record.get("threads"))
    if record.get("device", made_with["device"]) != made_with["device"]:
        log.warning("job %s was begun on %s and goes on on %s; bits differ", job_id, record["device"], made_with["device"])


def join_recorded(folder: JobFolder) -> tuple[str | None, int]:
    """(the mp4 of the blocks that the journal tells of, their frames); (None, 0) when there is none."""
    return join_blocks(folder, folder.request(), finished_blocks(folder))


def finished_blocks(folder: JobFolder) -> list[BlockReady]:
    """The finished blocks that the journal tells of and that are on disk, in order and without a gap."""
    found: list[BlockReady] = []
    for event in fold(folder.events()).blocks:
        path = folder.path / Path(event.path).name  # the folder may have moved
        if event.block != len(found) or not is_whole_segment(path, event.checksum):
            break
        found.append(dataclasses.replace(event, path=str(path)))
    return found
