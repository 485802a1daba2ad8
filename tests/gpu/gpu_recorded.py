"""Recorded steps of decoding on a GPU, in a minute: what they read is alive, what they leave is nothing."""

import contextlib
import gc
import itertools
import sys
import warnings

import torch
from configs import CONFIGS as MATRIX
from configs import opened
from gpu_report import Report, Skip, stage_options
from tiny import tiny_ids, tiny_llama

from lococo import cuda_graphs as graphs
from lococo import patch_model

NAMES = ("default", "default-slot", "open", "open-slot", "slots-per-head", "paper", "reference")
NAMES += ("h2o", "h2o-slot", "streaming", "streaming-absolute", "learned", "learned-slot", "learned-per-head")
CONFIGS = {**{name: MATRIX[name] for name in NAMES}, "long-blocks": opened(num_slots=32, block_size=32)}
PROMPT, BATCH, ANSWERS = 33, 2, 10
# On a GPU heads as wide as those of real models; the matrices stay small.
WIDE = dict(hidden_size=512, intermediate_size=512, num_attention_heads=8, initializer_range=0.05)
POISON = 123456789
# Bytes that ten answers may leave: one graph's pool has blocks of 2 MiB; a CPU's tensors are counted one by one.
ROOM_LEFT = {"cuda": 16 << 20, "cpu": 4096}
COPIES = {"cuda": 40, "cpu": 1}  # of every size; the tape sees by itself what is freed


class Counted:
    """A recorder that counts its recordings."""

    def __init__(self, record):
        self.record, self.recordings = record, 0

    def __call__(self, function):
        self.recordings += 1
        return self.record(function)


@contextlib.contextmanager
def recorders(device, record):
    """In the block steps on a kind of device are recorded so; never, for None."""
    before = dict(graphs.RECORDERS)
    graphs.RECORDERS.clear()
    if record is not None:
        graphs.RECORDERS[device.type] = record
    try:
        yield
    finally:
        graphs.RECORDERS.clear()
        graphs.RECORDERS.update(before)


def recorder_of(device):
    if device.type == "cpu":
        from step_tape import TapeRecorder  # a CUDA graph's rules

        return Counted(TapeRecorder())
    return Counted(graphs.RECORDERS[device.type])


def model_on(device, config, **overrides):
    is_gpu = device.type == "cuda"
    model = patch_model(tiny_llama(**{**(WIDE if is_gpu else {}), **overrides}), config)
    return model.to(device, torch.bfloat16 if is_gpu else torch.float32)


def poison(device):
    """Whatever was freed holds something else from now on: numbers out of all bounds, or no numbers."""
    junk, copies = [], range(COPIES[device.type])
    for elements in (2**power for power in range(0, 17, 2)):
        junk += [torch.full((elements,), POISON, dtype=torch.long, device=device) for _ in copies]
        junk += [torch.full((elements,), float("nan"), device=device) for _ in copies]
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Steps:
    """A text with a cache of its own, one token after another, as ``generate`` reads them."""

    def __init__(self, model, ids, mask=None):
        self.model, self.ids = model, ids
        self.mask = torch.ones_like(ids) if mask is None else mask
        with torch.no_grad():
            output = model(ids[:, :PROMPT], attention_mask=self.mask[:, :PROMPT], use_cache=True)
        self.cache, self.read = output.past_key_values, PROMPT

    @torch.no_grad()
    def take(self, steps, between=lambda: None):
        """(batch, steps, vocabulary) logits of the next tokens."""
        logits = []
        for stop in range(self.read + 1, self.read + steps + 1):
            between()
            mask = self.mask[:, :stop]
            output = self.model.__call__(
                input_ids=self.ids[:, stop - 1 : stop],
                attention_mask=mask,
                position_ids=mask.sum(-1, keepdim=True) - 1,
                past_key_values=self.cache,
            )
            logits.append(output.logits)
        self.read += steps
        return torch.cat(logits, dim=1)


def text(device, steps):
    return tiny_ids(BATCH, PROMPT + steps).to(device)


def padded_mask(ids):
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    return mask


def compare(got, expected, found):
    found["difference"] = (got.double() - expected.double()).abs().max().item()
    assert not got.isnan().any(), "logits are not numbers"
    assert torch.equal(got, expected), f"logits differ by up to {found['difference']:.2e}"


def recorded_equals_launched(found, device, steps, name, is_padded):
    gc.collect()  # where a graph is freed, others of its stream may be recorded anew
    config, ids = CONFIGS[name], text(device, steps)
    model, mask = model_on(device, config), padded_mask(ids) if is_padded else None
    with recorders(device, None):
        expected = Steps(model, ids, mask).take(steps)
    recorder = recorder_of(device)
    with recorders(device, recorder):
        got = Steps(model, ids, mask).take(steps, lambda: poison(device))
    compare(got, expected, found)
    # Rows of unequal length whose positions move apart from the slots are never recorded.
    is_recorded = not (is_padded and config.positions == "slot")
    assert bool(recorder.recordings) == is_recorded, f"{recorder.recordings} recordings"


def outlives_another(found, device, steps):
    """A recording goes on while another one, made before it or after it, is freed."""
    model, ids = model_on(device, CONFIGS["open"]), text(device, 2 * steps)
    with recorders(device, None):
        expected = Steps(model, ids).take(2 * steps)[:, steps:]
    recorder = recorder_of(device)
    with recorders(device, recorder):
        first, kept, last = (Steps(model, ids) for _ in range(3))
        for each in (first, kept, last):
            each.take(steps)
        assert recorder.recordings >= 3, f"{recorder.recordings} recordings in place of 3"
        del first, last, each
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        compare(kept.take(steps, lambda: poison(device)), expected, found)


def held_bytes(device):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(device)
    tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor]
    return sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}.values())


def answers_leave_nothing(found, device, steps):
    model, ids = model_on(device, CONFIGS["open"]), text(device, steps)[:, :PROMPT]
    recorder = recorder_of(device)
    with recorders(device, recorder):
        model.generate(ids, max_new_tokens=steps, do_sample=False)
        before = held_bytes(device)
        for _ in range(ANSWERS):
            model.generate(ids, max_new_tokens=steps, do_sample=False)
        grown = held_bytes(device) - before
    found["detail"] = f"{grown} bytes after {ANSWERS} answers"
    assert recorder.recordings > ANSWERS, f"{recorder.recordings} recordings of {ANSWERS + 1} answers"
    most = ROOM_LEFT[device.type]
    assert grown <= most, f"{found['detail']}, at most {most}"


def rope_that_asks_the_host(found, device, steps):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    overrides = {"max_position_embeddings": PROMPT + steps // 2, "rope_parameters": rope}
    model, ids = model_on(device, CONFIGS["default"], **overrides), text(device, steps)
    with recorders(device, None):
        expected = Steps(model, ids).take(steps)
    with recorders(device, recorder_of(device)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compare(Steps(model, ids).take(steps), expected, found)


def survives_a_failed_capture(found, device, steps):
    """The host waits for the GPU inside of a capture, which ends it. Everything goes on, and the next one succeeds."""
    record = recorder_of(device)

    def spoiled(function):
        def waits():
            output = function()
            output.logits.sum().item()
            return output

        record(waits)
        raise RuntimeError("this recorder lets the host wait")  # the stand-in; a capture failed on the line before

    model, ids = model_on(device, CONFIGS["open"]), text(device, steps)
    stream = torch.cuda.current_stream() if device.type == "cuda" else None
    with recorders(device, None):
        expected = Steps(model, ids).take(steps)
    with recorders(device, spoiled), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        compare(Steps(model, ids).take(steps), expected, found)
    told = [str(warning.message) for warning in told if "CUDA graph" in str(warning.message)]
    assert record.recordings == 1, f"{record.recordings} captures were tried in place of 1"
    assert len(told) == 1, f"{len(told)} warnings in place of 1: {told}"
    if device.type == "cuda":
        assert torch.cuda.current_stream() == stream, "another stream is current"
        assert not torch.cuda.is_current_stream_capturing(), "the stream is still being captured"
        torch.cuda.empty_cache()
        torch.zeros(1 << 30, dtype=torch.uint8, device=device)
    recorder = recorder_of(device)
    with recorders(device, recorder):
        compare(Steps(model_on(device, CONFIGS["open"]), ids).take(steps), expected, found)
    assert recorder.recordings, "nothing is recorded any more"


def second_device(found, device, steps):
    """A model on one device while another one is current."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        raise Skip("there is one device")
    other = torch.device("cuda", 1)
    for name in ("open", "slots-per-head"):
        recorded_equals_launched(found, other, steps, name, is_padded=False)
    assert torch.cuda.current_device() == 0, "another device is current"


OTHERS = {
    "on a second device": second_device,
    "a recording outlives others": outlives_another,
    "answers leave no memory behind": answers_leave_nothing,
    "a rope that asks the host": rope_that_asks_the_host,
    "a failed capture is survived": survives_a_failed_capture,  # last: one that is not may take the device with it
}


def main():
    parser = stage_options(__doc__)
    parser.add_argument("--steps", type=int, default=60, help="of every answer (default: %(default)s)")
    options = parser.parse_args()
    report = Report(options, "Recorded steps against launched ones, bit for bit, while freed memory is overwritten.")
    for name, is_padded in itertools.product(CONFIGS, (False, True)):
        with report.check(check="recorded = launched", of=name + ", padded" * is_padded) as found:
            recorded_equals_launched(found, report.device, options.steps, name, is_padded)
    for name, check in OTHERS.items():
        with report.check(check=name, of="") as found:
            check(found, report.device, options.steps)
    return report.status()


if __name__ == "__main__":
    sys.exit(main())
