"""What a crash or a restart of the program left behind: which jobs were cut off, which of them can go on here, and what of them
is there already."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dualparal.errors import DualParalError, RequestError
from dualparal.events import FINAL, BlockReady, Cancelled, Failed, Finished, Interrupted, Queued, Started
from dualparal.files import is_whole_segment
from dualparal.media.metadata import describe
from dualparal.runtime.claim import claim, is_claimed
from dualparal.runtime.ending import join_blocks
from dualparal.runtime.engine_options import CHANGES
from dualparal.runtime.journal import JobFolder, finish_deleting, list_jobs

log = logging.getLogger(__name__)
MAX_INTERRUPTIONS = 5  # a job that was running whenever the program died may be why it died


def cut_off(outputs: Path) -> Iterator[JobFolder]:
    """Jobs that have not ended and that nobody works on, the oldest first; those that cannot go on are ended here."""
    finish_deleting(outputs)
    for folder in reversed(list(list_jobs(outputs))):
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
                reason = _note(folder)
            finally:
                held.release()
        except DualParalError as error:
            log.warning("job %s cannot be recovered: %s", folder.job_id, error, extra={"job_id": folder.job_id})
            continue
        if reason is None:
            yield folder
        else:
            log.warning("job %s is given up: %s", folder.job_id, reason, extra={"job_id": folder.job_id})


def _note(folder: JobFolder) -> str | None:
    """Write down that a running job was cut off; the reason when it will not go on, and then it is ended with it."""
    reason = None
    events = folder.events()
    since_end = next((place for place, event in enumerate(reversed(events)) if isinstance(event, FINAL)), len(events))
    if folder.record().get("has_tensors"):
        reason = "the program was ended before the job was done, and the tensors it was given are not kept; submit it again"
    if folder.record().get("baseline"):
        reason = "the program was ended before the comparison was done; start it again"
    last = next((event for event in reversed(events) if isinstance(event, (Started, Queued, Interrupted))), None)
    if isinstance(last, Started):
        folder.append(Interrupted(job_id=folder.job_id, kind="EngineError", message="the program was ended while the job ran"))
        # What was cut off before it was resumed by hand does not count.
        if sum(isinstance(event, Interrupted) for event in events[len(events) - since_end :]) >= MAX_INTERRUPTIONS:
            reason = f"the job was cut off {MAX_INTERRUPTIONS + 1} times; resume it by hand to try again"
    if folder.stop_wish.is_file():
        path, num_frames = join_told(folder)
        folder.append(Cancelled(job_id=folder.job_id, path=path, num_frames=num_frames))
        folder.stop_wish.unlink(missing_ok=True)
        return "it had been asked to stop"
    if reason is not None:
        path, num_frames = join_told(folder)
        folder.append(Failed(job_id=folder.job_id, kind="EngineError", message=reason, path=path, num_frames=num_frames))
    return reason


def check_can_go_on(folder: JobFolder, made_with: Mapping[str, Any]) -> None:
    """Raise `RequestError` unless an engine whose jobs are `made_with` this model and these options can go on with the job and
    give the bits it would have given."""
    job_id, record = folder.job_id, folder.record()
    if is_claimed(folder):
        raise RequestError(f"job {job_id} is being worked on; wait for it or stop it first", "job_id")
    if isinstance(folder.final_event(), Finished) and _is_playable(folder.video):
        raise RequestError(f"job {job_id} has finished; its video is {folder.video}", "job_id")
    if record.get("model") != made_with["model"] or record.get("dtype") != made_with["dtype"]:
        raise RequestError(
            f"job {job_id} was made with {record.get('model')} in {record.get('dtype')}; this engine runs "
            f"{made_with['model']} in {made_with['dtype']}",
            "job_id",
        )
    before, now = ({key: one[key] for key in CHANGES if key in one} for one in (record, made_with))
    if before != now:
        raise RequestError(f"job {job_id} was made with {before}, this engine runs {now}", "job_id")
    if record.get("baseline"):
        raise RequestError(f"job {job_id} was a comparison, which does not go on; start it again", "job_id")
    if record.get("has_tensors"):
        raise RequestError(f"job {job_id} was given tensors, which are not kept; submit it again", "job_id")


def _is_playable(video: Path) -> bool:
    """A power cut may leave the end in the journal and a torn video."""
    try:
        return int(describe(video)["num_frames"]) > 0
    except RequestError:
        return False


def warn_of_other_bits(folder: JobFolder, made_with: Mapping[str, Any]) -> None:
    """Log what differs between the engine that began a job and the one that goes on with it, and may change bits."""
    job_id, record = folder.job_id, folder.record()
    if record.get("threads") != made_with["threads"]:
        log.warning("job %s was begun with %s threads per process; bits may differ", job_id, record.get("threads"))
    if record.get("device", made_with["device"]) != made_with["device"]:
        log.warning("job %s was begun on %s and goes on on %s; bits differ", job_id, record["device"], made_with["device"])


def join_told(folder: JobFolder) -> tuple[str | None, int]:
    """(the mp4 of the blocks that the journal tells of, their frames); (None, 0) when there is none."""
    return join_blocks(folder, folder.request(), told_blocks(folder))


def told_blocks(folder: JobFolder) -> list[BlockReady]:
    """The finished blocks that the journal tells of and that are on disk, in order and without a gap."""
    known = {event.block: event for event in folder.events() if isinstance(event, BlockReady)}
    found: list[BlockReady] = []
    for block in sorted(known):
        path = folder.path / Path(known[block].path).name  # the folder may have moved
        if block != len(found) or not is_whole_segment(path):
            break
        found.append(dataclasses.replace(known[block], path=str(path)))
    return found
