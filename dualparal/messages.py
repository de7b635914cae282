"""Everything that crosses a process border inside one engine, besides the public events. Frozen, picklable, no torch types
on the front end's side: arrays travel as numpy.

    front end ─ RunJob, CancelJob, Steer, Finish, Played, Shutdown ─► rank 0 ─ JobSpec (broadcast) ─► ranks 1 … N-1
    rank 0 ─ EncodeText, EncodePicture, EncodeClip, OpenVideo, TurnVideo, DecodeBlock, CloseVideo, Shutdown ─► codec
    codec ─ Embeddings, EncodedPicture ─► rank 0
    every worker ─ Ready, Beat, Spans, WorkerError, ... and public events ─► front end
    across hosts also `dualparal.hosts.messages`
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dualparal.events import Steered, WrappedUp
from dualparal.method.grid import Grid
from dualparal.method.plan import BlockPlan
from dualparal.method.schedule import Rules
from dualparal.model.lora_source import Lora
from dualparal.options import EngineOptions
from dualparal.prompts import Shot
from dualparal.request import Settings

if TYPE_CHECKING:
    import numpy as np

    from dualparal.model.stage import Conditions, JobShape


@dataclass(frozen=True)
class WorkerOptions:
    """How one worker is to run; the same object goes to all ranks and the codec of an engine: the engine's settled options,
    and what they came to on these hosts.

    `layers[r]` is rank r's range of layers, `devices[r]` its device. `engine.worker_hook` ("module:function") is called in
    every worker with its parts before it serves: tests and benchmarks put faults, delays and null models there.
    """

    engine: EngineOptions
    folder: str
    layers: tuple[range, ...]
    devices: tuple[str, ...]
    codec_device: str
    loras: tuple[Lora, ...] = ()  # the files of `engine.loras`
    text_cache: str | None = None  # folder of embeddings kept across runs
    clock_ahead_s: float = 0.0  # of the front end's monotonic clock over this host's
    ring_key: bytes = field(default=b"", repr=False)  # by which ranks know each other; drawn for every group of workers
    meeting_folder: str | None = None  # where the ranks of one host meet; only this user can open it
    listen_address: str | None = None  # where the front end takes in other hosts ("": everywhere); None: all ranks are here

    @property
    def ranks(self) -> int:
        return len(self.layers)

    @property
    def grid(self) -> Grid:
        return Grid.of(self.ranks, self.engine.guidance_parallel)


@dataclass(frozen=True, kw_only=True)
class Take:
    """One request with several seeds: the `number`-th (from 0) of `num_takes`; `group` is the first one's job id. It rests when
    its first block has done `rest_at` steps."""

    group: str
    number: int
    num_takes: int
    rest_at: int


@dataclass(frozen=True)
class RunJob:
    """Front end to rank 0: make this video. `request` is resolved; arrays are float32 numpy."""

    job_id: str
    request: Settings
    folder: str
    return_latents: bool = False
    export_images: bool = False
    latents: tuple[np.ndarray, ...] | None = None  # per block [1, C, F, h, w]
    prompt_embeds: np.ndarray | None = None  # [1, L, text dim]
    negative_prompt_embeds: np.ndarray | None = None
    is_resumed: bool = False  # go on from the state in `folder`
    is_baseline: bool = False  # for a worker of plain Wan
    take: Take | None = None
    rest_at: int = 0  # rest, saved, once the first block has done so many steps; 0: go on to the end
    loras: tuple[Lora, ...] = ()  # the files of `request.loras`


@dataclass(frozen=True)
class CancelJob:
    """Front end to rank 0: leave `job_id` at the next block step."""

    job_id: str


@dataclass(frozen=True)
class Steer:
    """Front end to rank 0: `shot` from the first block of `job_id` on that has not entered. Answered with the same `number`."""

    job_id: str
    number: int
    shot: Shot


@dataclass(frozen=True)
class Finish:
    """Front end to rank 0: let no further block of an endless `job_id` enter. Answered with the same `number`."""

    job_id: str
    number: int


@dataclass(frozen=True)
class Played:
    """Front end to rank 0: somebody watches `job_id`, and has seen its first `seconds`. Not answered."""

    job_id: str
    seconds: float


TOO_LATE = "every block of the film has entered already; what is under way keeps its text"


@dataclass(frozen=True)
class SteerAnswer:
    """Rank 0 to the front end: the new `timeline`, on disk already, and what is to be told of it; or why there is none.
    `number` 0: nobody has asked, an endless film is planned further."""

    job_id: str
    number: int
    steered: Steered | WrappedUp | None = None
    timeline: Settings | None = None
    refusal: str = ""


@dataclass(frozen=True)
class Shutdown:
    """No more work."""


@dataclass(frozen=True)
class JobSpec:
    """Rank 0 to all ranks: what they need to walk the same schedule."""

    job_id: str
    rules: Rules
    plan: BlockPlan
    experts: tuple[int, ...]
    shape: JobShape
    conditions: list[Conditions]
    start: int = 0  # index of the first item to run
    is_turn: bool = False  # the job under way goes on by another timeline
    loras: tuple[Lora, ...] = ()  # that run beside the weights


@dataclass(frozen=True)
class EncodeText:
    """Rank 0 to the codec: all texts of a job at once, or one that it is steered to."""

    job_id: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Embeddings:
    """Codec to rank 0: for each text a float32 array [1, tokens, text dim], without the zeros that fill it up to 512, the first
    word of each that did not fit into them (None: all did), and the seconds it took."""

    job_id: str
    arrays: tuple[np.ndarray, ...]
    lost_words: tuple[str | None, ...]
    seconds: float
    texts: tuple[str, ...]


@dataclass(frozen=True)
class EncodePicture:
    """Rank 0 to the codec: a picture that a film is to begin with, uint8 [H, W, 3]."""

    job_id: str
    picture: np.ndarray


@dataclass(frozen=True)
class EncodeClip:
    """Rank 0 to the codec: the clip that a film goes on from, an mp4 of that size in the job's folder; of its frames the last
    4k + 1, and no more than make `most_latents`."""

    job_id: str
    file: str
    width: int
    height: int
    most_latents: int


@dataclass(frozen=True)
class EncodedPicture:
    """Codec to rank 0: its latent frames, float32 [1, C, F, h, w]; F is 1 for a picture, and 0 for a clip that cannot be
    read."""

    job_id: str
    latent: np.ndarray
    seconds: float


@dataclass(frozen=True)
class OpenVideo:
    """`before`: latents [1, C, F, h, w] float32 of a film that this one continues: to be decoded, not shown."""

    job: RunJob
    height: int
    width: int
    before: np.ndarray | None = None


@dataclass(frozen=True)
class TurnVideo:
    """Rank 0 to the codec: the blocks to come are those of another timeline, `job.request`'s."""

    job: RunJob


@dataclass(frozen=True)
class DecodeBlock:
    job_id: str
    block: int
    latents: np.ndarray  # [1, C, F, h, w] float32


@dataclass(frozen=True)
class CloseVideo:
    """The last block has been sent (or the job was stopped): join what there is."""

    job_id: str
    is_cancelled: bool
    timings: dict[str, float]


@dataclass(frozen=True)
class Ready:
    """A worker has loaded its share. `about` is for logs and tests: parameter names, bytes, seconds."""

    name: str
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StorePort:
    """Rank 0 to the front end: where the rendezvous store listens; front end to all ranks, once all are there: go and meet.

    `interface` is the one gloo talks over; with several hosts GLOO_SOCKET_IFNAME may name another.
    """

    port: int
    host: str = "127.0.0.1"
    interface: str | None = None


@dataclass(frozen=True)
class Beat:
    """A worker is alive. Sent by a thread of its own about once a second, so it says what the main thread is at: one `step`,
    for `busy_s` so far. With the memory that it holds, and on a GPU, if it has one."""

    name: str
    resident_bytes: int | None = None
    device_bytes: int | None = None
    step: str = ""
    busy_s: float = 0.0
    touched_bytes: int | None = None  # read from files or mapped in so far; says whether one that loads gets on


@dataclass(frozen=True)
class Span:
    """A stage (or the codec) worked from `start_s` to `end_s`, seconds of the front end's monotonic clock, on a block step."""

    stage: str
    start_s: float
    end_s: float
    block: int
    step: int

    def later(self, seconds: float) -> Span:
        """The same work told by a clock that is `seconds` ahead."""
        return replace(self, start_s=self.start_s + seconds, end_s=self.end_s + seconds) if seconds else self


@dataclass(frozen=True)
class Spans:
    job_id: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Denoised:
    """Rank 0 has left the job (all steps done, or stopped) and can take the next; decoding may go on."""

    job_id: str


@dataclass(frozen=True)
class VideoClosed:
    """The codec has put the last byte of a job on disk. `latents` only when asked for."""

    job_id: str
    is_cancelled: bool
    path: str | None
    num_frames: int
    timings: dict[str, float]
    latents: np.ndarray | None


@dataclass(frozen=True)
class JobError:
    """A job cannot go on but the worker can (bad input, disk full)."""

    job_id: str
    kind: str
    message: str


@dataclass(frozen=True)
class WorkerError:
    """A worker is about to end because of an error; the traceback is in its log."""

    name: str
    kind: str
    message: str
