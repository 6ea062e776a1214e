"""Checkpoints: a `save_pretrained` folder for users, the training states beside it for us. All safetensors, all atomic.

A state is a file, `state-<step>.safetensors`, or, of a sharded model, a folder `state-<step>` with a file from each rank, its
pieces of the tensors. Where they belong stands in the files' headers as `torch.distributed.checkpoint` has it there, so that
its HuggingFaceStorageReader reads them too; nothing is pickled. Any number of ranks goes on from either.
"""

import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from pipeline.models import ORIGIN, ModelRef, Origin, reference
from pipeline.store.shards import publish, sweep, sync, sync_folder, temporary_name
from schemas.config import Train
from schemas.errors import OpdError
from train.adapters import attach
from train.distributed import gather, piece, rank, ranks, wait_for_all
from train.states import STATES, SUFFIX, forget, state_path, states, sweep_states

PIECES, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
"""Where a header says of each tensor at which index of the whole one its piece begins."""
DAMAGE = (SafetensorError, KeyError, ValueError, OSError)
"""What reading a damaged file raises."""


class Tensors(Mapping[str, torch.Tensor]):
    """The tensors of a state, whole, by name. Each is read when it is asked for; one that is not in pieces isn't copied, so
    that a slice of it takes no more than that.

    Attributes:
        about: the description that was saved with them.
    """

    def __init__(self, path: Path) -> None:
        """Open the files. Raises one of DAMAGE when some are missing, cut, or have no header of ours."""
        self._headers: list[tuple[Any, dict[str, str]]] = []
        self._where: dict[str, list[tuple[Any, list[int]]]] = {}
        for file in _files(path):
            opened = safe_open(file, "pt")
            header = opened.metadata() or {}
            self._headers.append((opened, header))
            begins = json.loads(header[PIECES]) if PIECES in header else {}
            for name in opened.keys():  # noqa: SIM118 - no mapping
                self._where.setdefault(name, []).append((opened, begins[name][OFFSETS] if begins else []))
        self.about: dict[str, Any] = json.loads(self._headers[0][1]["opd"])

    def __getitem__(self, name: str) -> torch.Tensor:
        pieces = [(file.get_tensor(name), begin) for file, begin in self._where[name]]
        if len(pieces) == 1:
            return pieces[0][0]
        ends = [[a + n for a, n in zip(begin, part.shape, strict=True)] for part, begin in pieces]
        whole = pieces[0][0].new_empty([max(end) for end in zip(*ends, strict=True)])
        for (part, begin), end in zip(pieces, ends, strict=True):
            whole[tuple(map(slice, begin, end))] = part
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def are_intact(self, part: int = 0, parts: int = 1) -> bool:
        """Whether bytes have their checksums: of every `parts`-th tensor of the files from `part` on, one at a time."""
        number = 0
        for file, header in self._headers:
            sums, offsets = json.loads(header["crc32"]), json.loads(header.get(PIECES, "{}"))
            names = list(file.keys())
            if sums.pop("") != _checksum(json.loads(header["opd"])) or sums.keys() != set(names):
                return False
            for name in names:
                number += 1
                begin = offsets[name][OFFSETS] if offsets else None
                if number % parts == part and sums[name] != _checksum(file.get_tensor(name), begin):
                    return False
        return True


State = tuple[Tensors, dict[str, Any]]
"""Tensors and the JSON-able description that was saved with them."""


def save_state(path: Path, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """Write whole tensors, their checksums and a JSON-able description to one safetensors file, atomically."""
    with publish(path) as temporary:
        _write(temporary, {name: tensor.contiguous() for name, tensor in tensors.items()}, about)
    forget(path.with_suffix(""))  # what a sharded run left of this step


def save_pieces(path: Path, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """Write the state of a sharded model to a folder, each rank its own pieces, atomically; all ranks call it.

    A rank holds no more than its pieces. Of tensors that all have, rank 0 writes its own, and its description.
    """
    work = path.with_name(f".{path.name}.tmp")  # one for all ranks; nobody else writes here (`only_trainer`)
    if rank() == 0:
        try:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
        except OSError as error:
            raise OpdError(f"{path}: cannot write here: {error.strerror}") from error
    wait_for_all()
    found = {name: piece(tensor) for name, tensor in tensors.items() if isinstance(tensor, DTensor) or rank() == 0}
    own = {name: (part, begin) for name, (part, begin) in found.items() if part.numel() or rank() == 0}
    with publish(work / f"part-{rank():05}-of-{ranks():05}.safetensors") as temporary:
        parts = {name: part.cpu().contiguous() for name, (part, _) in own.items()}
        _write(temporary, parts, about if rank() == 0 else {}, {name: begin for name, (_, begin) in own.items()})
    wait_for_all()
    if rank() == 0:
        try:
            sync_folder(work)
            forget(path)
            work.rename(path)
            sync(path.parent)
        except OSError as error:
            raise OpdError(f"{path}: cannot write: {error.strerror or error}") from error
        forget(path.with_suffix(SUFFIX))
    wait_for_all()


def _write(
    path: Path,
    tensors: dict[str, torch.Tensor],
    about: dict[str, Any],
    offsets: dict[str, list[int]] | None = None,
) -> None:
    """One file; `offsets` of pieces."""
    begins = offsets or {}
    sums = {"": _checksum(about)} | {name: _checksum(tensor, begins.get(name)) for name, tensor in tensors.items()}
    metadata = {"opd": json.dumps(about, sort_keys=True), "crc32": json.dumps(sums)}
    if offsets is not None:
        metadata[PIECES] = json.dumps({name: {OFFSETS: begin} for name, begin in offsets.items()})
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OpdError(f"{path}: cannot write: {error}") from error


def _files(path: Path) -> list[Path]:
    """Of a state. Raises ValueError when a rank's is missing."""
    if not path.is_dir():
        return [path]
    found = sorted(path.glob("part-*.safetensors"))
    count = int(found[0].stem.rpartition("-")[2]) if found else 1
    if len(found) != count:
        raise ValueError(f"{len(found)} of {count} files")
    return found


def load_state(path: Path, together: bool = False) -> State:
    """The tensors and the description that were saved. Raises OpdError when a byte is damaged.

    Args:
        together: all ranks ask, each checks its share of the bytes, and all are told alike.
    """
    found = None
    try:
        tensors = Tensors(path)
        if tensors.are_intact(*((rank(), ranks()) if together else ())):
            found = tensors
    except DAMAGE:
        pass
    intact = found is not None if not together else bool(gather([found is not None]).all())
    if found is None or not intact:
        raise OpdError(f"{path}: this training state is damaged; delete it to train the round again")
    return found, found.about


def _about(path: Path) -> dict[str, Any]:
    """A state's description, without reading tensors; safetensors checks that a file has its full length."""
    return Tensors(path).about


def _checksum(what: torch.Tensor | dict[str, Any], begin: list[int] | None = None) -> int:
    """CRC-32 of a tensor's kind, shape, place and bytes, or of a description: finds damage at memory speed; nothing here guards
    against malice."""
    if isinstance(what, dict):
        return zlib.crc32(json.dumps(what, sort_keys=True).encode())
    place = "" if begin is None else f" at {begin}"
    of_kind = zlib.crc32(f"{what.dtype} {tuple(what.shape)}{place}".encode())
    return zlib.crc32(what.detach().cpu().reshape(-1).view(torch.uint8).numpy().data, of_kind)


def newest_state(folder: Path, identity: dict[str, Any], say: Callable[[str], None] = lambda _: None) -> State | None:
    """The newest intact state of what `identity` names; None when there is nothing to go on from. All ranks ask together.

    `say` is told of every damaged one that an older one stands in for. Raises OpdError when all that could have been it
    are damaged.
    """
    damaged: list[OpdError] = []
    for path in states(folder):
        try:
            if _about(path)["identity"] != identity:
                continue
        except DAMAGE:
            pass  # what it was can't be told any more
        try:
            found = load_state(path, together=True)
        except OpdError as error:
            damaged.append(error)
            continue
        for broken in damaged:
            say(f"{str(broken).split(';', maxsplit=1)[0]}; going on from {path.name} instead")
        return found
    if damaged:
        raise damaged[0]
    return None


def final_state(folder: Path, together: bool = False) -> State:
    """The state that a finished round ended with; `together` as of `load_state`.

    Raises OpdError when it is missing, damaged or not the round's last.
    """
    if not (found := states(folder)):
        raise OpdError(f"{folder}: no training state of the round before; train that round again")
    tensors, about = load_state(found[0], together)
    if about["step"] != about["steps"]:
        raise OpdError(
            f"{found[0]}: this state is of step {about['step']} of {about['steps']}; finish that round before the next"
        )
    return tensors, about


def forget_states(folder: Path, identity: dict[str, Any], step: int, keep: int) -> None:
    """Remove all states but the `keep` newest of `identity` that are not beyond `step`, and what killed writers left."""
    kept = 0
    for path in states(folder):
        try:
            ours = _about(path)["identity"] == identity and path.stem <= state_path(folder, step).stem
        except DAMAGE:
            ours = False
        if ours and kept < keep:
            kept += 1
        else:
            forget(path)
    sweep_states(folder / STATES)


def is_finished(folder: Path) -> bool:
    """Whether the newest state in a folder is one that a round ended with, as far as its description tells."""
    try:
        about = _about(states(folder)[0])
        return bool(about["step"] == about["steps"])
    except (IndexError, *DAMAGE):
        return False


def trained(model: Any, tensors: Mapping[str, torch.Tensor], settings: Train) -> Any:
    """The model that a state stands for: its average with `train.ema`, its adapters merged with `train.lora`.

    Args:
        model: what the training of `tensors` began with; it is changed.
    """
    adapters = attach(model, settings.lora) if settings.lora else None
    kind = "ema" if settings.ema else "master"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = tensors[f"{kind}/{name}"].to(parameter.device)
            parameter.data = value if adapters else value.to(parameter.dtype)  # adapters merge in float32
    return adapters.merge_and_unload() if adapters else model


def export(model: Any, tokenizer: Any, folder: Path, card: str, source: str, teacher: Origin | None = None) -> ModelRef:
    """Publish a folder that `from_pretrained` loads: weights, tokenizer, generation config, a model card and its teacher."""
    sweep(folder)
    work = temporary_name(folder)
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        (work / "README.md").write_text(card)
        if teacher:
            (work / ORIGIN).write_text(teacher.model_dump_json(indent=1) + "\n")
        sync_folder(work)
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
    except (OSError, SafetensorError) as error:
        raise OpdError(f"{folder}: cannot write: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return reference(source, folder)
