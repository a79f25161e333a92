# SPDX-License-Identifier: Apache-2.0
"""A run of tiny shapes, and the figures that are derived from what was measured."""

import dataclasses

import pytest
import torch

from benchmarks import inference, measure
from benchmarks.inference import InferenceArguments
from benchmarks.measure import is_installed
from benchmarks.models import CONTENDERS, compile_towers, get_weight_bytes, make_contenders


def test_a_run_compares_all_resolutions_and_draws(run_benchmark, capsys):
    options = ("--repeats", "2", "--warmup", "0", "--new_tokens", "12", "--batch_sizes", "1", "2")
    variants = ["eager", "static", *(["4bit"] if is_installed("bitsandbytes") else [])]
    results = run_benchmark(inference, *options, "--variants", *variants)
    tokens = {name: entry["image_tokens"] for name, entry in results["resolutions"]["1"].items()}
    assert tokens == {
        **{"llava-hr-384": 9, "llava-hr-768": 9, "llava-hr-1024": 16, "llava-hr-1536": 36},
        **{"llava-1.5-336": 9, "llava-1.5-448": 16, "llava-1.5-672": 36, "llava-1.5-1022": 81},
        **{"llava-hr-1024-16:9": 16, "llava-hr-1024-1:3": 8},  # of 4 x 4 cells
    }
    for batch_size, entries in results["resolutions"].items():
        assert entries.keys() == tokens.keys()
        for entry in entries.values():
            first, ten, gap = (entry["seconds"][n]["median"] for n in ("first_token", "ten_tokens", "next_token"))
            assert 0 < first < ten and 0 < gap < ten
            assert entry["tokens_per_second"] == pytest.approx(int(batch_size) * 10 / ten)
            assert entry["decoded_tokens_per_second"] == pytest.approx(int(batch_size) / gap)
    assert len(results["variants"]) == 2 + 2 * len(variants)
    assert f"llava-1.5-1022, {variants[-1]}" in results["variants"]
    assert [target["met"] for target in results["targets"][:3]] == [None] * 3  # they are about 7B on a GPU
    assert results["targets"][3]["met"] in (True, False)
    assert "(target: at least 6)" in capsys.readouterr().out


def test_an_answers_next_token_is_the_median_gap(contenders, monkeypatch):
    """Slow tokens, such as those during which CUDA graphs are recorded, do not count."""
    moments = [1.0, 9.0, 9.5, 10.0, 10.5, 11.0, 11.5, 12.0, 12.5, 13.0]
    monkeypatch.setattr(inference, "answer", lambda *_: moments)
    contender = contenders["llava-hr-1024"]
    phases = inference.measure(contender, contender.make_inputs(1), 10)
    assert phases.pop("towers") > 0 and phases == {"first_token": 1, "ten_tokens": 13, "next_token": 0.5}


def test_real_shapes_on_a_cpu(tiny, run_benchmark, monkeypatch):
    monkeypatch.setitem(inference.SHAPES, "7b-cpu", tiny)
    results = run_benchmark(inference, "--preset", "7b-cpu")
    unpadded = ["llava-hr-1024-16:9", "llava-hr-1024-1:3"]
    assert list(results["resolutions"]["1"]) == ["llava-hr-384", "llava-hr-1024", "llava-1.5-1022", *unpadded]
    assert all(target["measured"] for target in results["targets"])
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(measure, "computes_bfloat16", lambda supported=supported: supported)
        assert InferenceArguments(preset="7b-cpu").torch_dtype == dtype


def test_targets_compare_round_by_round():
    def phases(towers, first, ten):
        return {"towers": towers, "first_token": first, "ten_tokens": ten}

    timings = {
        "llava-hr-384": phases([1, 1], [8, 2], [10, 5]),
        "llava-hr-1024": phases([2, 1], [10, 5], [12.5, 6.25]),
        "llava-1.5-1022": phases([30, 10], [80, 40], [100, 50]),
        "llava-hr-1024-16:9": phases([2, 1], [8, 4], [10, 5]),
        "llava-hr-1024-1:3": phases([2, 1], [5, 2.5], [6, 3]),
    }
    targets = inference.find_targets(timings, InferenceArguments())
    # tokens/s at 1024: 0.8 of those at 384; towers: 2 of 10 and 1 of 5 seconds; LLaVA-1.5: 8 times as long
    assert [target["measured"]["median"] for target in targets] == pytest.approx([0.2, 0.2, 8, 8, 1.25, 2])
    assert [target["met"] for target in targets] == [None, None, None, True, False, True]
    for name, measured in (("llava-1.5-1022", [0, 1, 4, 5]), ("llava-hr-1024", [])):
        del timings[name]  # as if memory had not sufficed
        targets = inference.find_targets(timings, InferenceArguments())
        assert [index for index, target in enumerate(targets) if target["measured"] is not None] == measured


def test_a_run_continues_after_running_out_of_memory(run_benchmark, exhaust, capsys):
    exhaust(inference, "answer", lambda contender, *_: 1024 in contender.sides.values() and not contender.image_size)
    options = ("--repeats", "1", "--warmup", "0", "--new_tokens", "10", "--batch_sizes", "1", "--variants")
    results = run_benchmark(inference, *options, "eager")
    entry = results["resolutions"]["1"].pop("llava-hr-1024")
    sides = {"pixel_values": 1024, "low_res_pixel_values": 448}
    assert entry == {"sides": sides, "image_tokens": 16, "out_of_memory": True}
    assert all("seconds" in entry for entry in results["resolutions"]["1"].values())
    assert [target["measured"] for target in results["targets"]] == [None] * 6
    assert results["variants"]["llava-hr-1024, eager"]["out_of_memory"]
    assert capsys.readouterr().out.count(": not measured (target: ") == 6


def test_peaks_on_a_gpu(contenders, exhaust, no_gpu_statistics):
    arguments = InferenceArguments(repeats=1, new_tokens=10)
    arguments.device = "cuda"
    exhaust(inference, "answer", lambda contender, *_: 1536 in contender.sides.values())
    contest = {name: (contenders[name], "sdpa") for name in CONTENDERS[:4]}
    *_, (entries, timings) = inference.run_contest(contest, 1, arguments)
    assert entries["llava-hr-1536"]["out_of_memory"] and timings["llava-hr-1536"] is None
    weights = get_weight_bytes(contenders["llava-hr-384"].model)
    assert [entry.get("peak_bytes") for entry in entries.values()] == [weights + 100] * 3 + [None]


def test_the_language_model_is_in_memory_once(contenders):
    models = [contender.model for contender in contenders.values()]
    assert len({id(model.lm_head) for model in models}) == 1
    assert len({id(model.model.language_model) for model in models}) == 1
    # position embeddings of each side: a class token and the patches
    sizes = [model.model.vision_tower.embeddings.position_embedding.num_embeddings for model in models[4:]]
    assert sizes == [10, 17, 37, 82]


def test_attention_is_switched(tiny):
    shapes = dataclasses.replace(tiny, text={**tiny.text, "num_hidden_layers": 2})
    contender = make_contenders(shapes, ["llava-hr-1024"], "cpu", torch.float32)["llava-hr-1024"]
    inputs = contender.make_inputs(1)
    for variant, expected in (("eager", "eager"), ("sdpa", "sdpa"), ("static", "sdpa")):
        assert len(inference.answer(contender, inputs, 3, variant)) == 3
        model = contender.model.model
        for layer in model.language_model.layers:
            assert layer.self_attn.config._attn_implementation == expected
        assert model.vision_tower.config._attn_implementation == expected


def test_four_bit_language_model_is_as_users_get_it(contenders):
    pytest.importorskip("bitsandbytes", reason="the GPU image may lack it")
    quantized = inference.quantize(contenders, InferenceArguments())
    hr, llava = quantized.values()
    assert llava.model.model.language_model is hr.model.model.language_model
    assert llava.model.lm_head is hr.model.lm_head
    assert llava.model.model.vision_tower is not contenders["llava-1.5-1022"].model.model.vision_tower
    weight = hr.model.model.language_model.layers[0].mlp.up_proj.weight
    assert weight.quant_type == "nf4" and weight.quant_state.nested  # `get_4bit_config`
    # of 4 bytes, half a byte is left, and for each 64 weights a scale of 1 byte; tables and descriptions
    weights = 4 * 64 * 64 + 3 * 64 * 128
    saved = get_weight_bytes(contenders["llava-hr-1024"].model) - get_weight_bytes(hr.model)
    expected = 4 * weights - weights / 2 - weights / 64
    assert expected - 7 * 1400 < saved < expected
    for name, contender in quantized.items():
        inputs = contender.make_inputs(1)
        with torch.no_grad():
            expected = contenders[name].model(**inputs).logits
            logits = contender.model(**inputs).logits
        assert torch.isfinite(logits).all() and not torch.equal(logits, expected)
        # four bits of random weights: the same direction, more or less
        assert torch.cosine_similarity(logits.flatten(), expected.flatten(), dim=0) > 0.9


def test_compiled_towers_give_the_same_features(contenders):
    contender = contenders["llava-hr-1024"]
    compiled = compile_towers(contender)
    assert compiled.model.model.language_model is contender.model.model.language_model
    pixels = contender.make_pixels(2)
    with torch.no_grad():
        expected, outputs = (each.model.get_image_features(**pixels) for each in (contender, compiled))
    assert compiled.model.model.vision_tower._compiled_call_impl is not None
    for name in ("pooler_output", "high_res_features"):  # float32's rounding
        torch.testing.assert_close(outputs[name], expected[name], atol=1e-6, rtol=1e-5)
    for gate, its in zip(outputs.mr_adapter_gates, expected.mr_adapter_gates, strict=True):
        torch.testing.assert_close(gate, its, atol=1e-6, rtol=1e-5)
