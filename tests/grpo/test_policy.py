"""The policy hears the right audio everywhere, and its log-probs are transformers' own."""

import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo.batch import Completion, Group
from grpo.policy import Policy
from grpo.rollout import Sampling
from grpo.rollout.hf import HFRollout
from tests.conftest import LORA, make_clip, make_prompt, make_question

QUESTIONS = [make_question("first"), make_question("a second one, longer"), make_question("third")]
CLIPS = [make_clip(1, 0.6), make_clip(2, 1.3), make_clip(3, 0.35)]


def groups_of(policy, copies=3, clips=CLIPS, seed=0):
    prompts = [policy.encode(q, c) for q, c in zip(QUESTIONS, clips, strict=True)]
    return HFRollout(policy).generate(prompts, copies, Sampling(max_tokens=12, seed=seed))


def with_prompts(policy, groups, clips):
    """The same completions under the same questions with other clips."""
    return [Group(policy.encode(q, c), g.completions) for q, c, g in zip(QUESTIONS, clips, groups, strict=True)]


def logps(policy, groups):
    with torch.no_grad():
        return policy(policy.prepare(groups))[0]


def processor_inputs(policy, question, clip):
    text = policy.processor.apply_chat_template(
        policy.prompt.messages(question), tokenize=False, add_generation_prompt=True
    )
    return policy.processor(text=[text], audio=[clip.samples], sampling_rate=16000, return_tensors="pt")


@pytest.mark.parametrize("i", range(3))
def test_encode_equals_the_processor(policy, i):
    theirs = processor_inputs(policy, QUESTIONS[i], CLIPS[i])
    mine = policy.encode(QUESTIONS[i], CLIPS[i])
    frames = int(theirs["feature_attention_mask"].sum())
    assert torch.equal(mine.prompt_ids, theirs["input_ids"][0])
    assert mine.mel.shape[1] == frames
    assert torch.allclose(mine.mel, theirs["input_features"][0, :, :frames], atol=1e-5)


def test_log_probs_are_those_of_transformers_own_forward(policy):
    policy.temperature = 0.7
    groups = groups_of(policy)
    mine = logps(policy, groups)
    row = 0
    for question, clip, group in zip(QUESTIONS, CLIPS, groups, strict=True):
        for completion in group.completions:
            inputs = processor_inputs(policy, question, clip)
            tokens = torch.tensor([completion.token_ids])
            ids = torch.cat([inputs["input_ids"], tokens], 1)
            with torch.no_grad():
                logits = policy.model(
                    input_ids=ids, attention_mask=torch.ones_like(ids), input_features=inputs["input_features"],
                    feature_attention_mask=inputs["feature_attention_mask"], use_cache=False,
                ).logits[0, inputs["input_ids"].shape[1] - 1 : -1].float() / 0.7  # fmt: skip
            logits[:, policy.banned_ids] = float("-inf")
            theirs = logits.log_softmax(-1).gather(-1, tokens[0][:, None])[:, 0]
            assert torch.allclose(mine[row, : len(theirs)], theirs, atol=2e-5)
            assert (mine[row, len(theirs) :] == 0).all()
            row += 1


def test_sampler_and_trainer_agree(policy):
    groups = groups_of(policy)
    mine = logps(policy, groups)
    for row, completion in zip(mine, [c for g in groups for c in g.completions], strict=True):
        assert torch.allclose(row[: len(completion.token_ids)], torch.tensor(completion.sampler_logp), atol=1e-5)


def gradients(policy, groups, layout, pad):
    policy.layout, policy.pad = layout, pad
    policy.zero_grad()
    logp, _ = policy(policy.prepare(groups))
    weight = torch.randn(logp.shape, generator=torch.Generator().manual_seed(0))
    (logp * weight).sum().backward()
    return logp.detach(), {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("layout", "pad"), [("separate", "right"), ("separate", "left")])
def test_layout_and_padding_side_change_nothing(policy, layout, pad):
    groups = groups_of(policy)
    logp, grads = gradients(policy, groups, "shared", "right")
    other, other_grads = gradients(policy, groups, layout, pad)
    assert torch.allclose(logp, other, atol=1e-5)
    scale = max(g.abs().max() for g in grads.values())
    assert max((grads[n] - other_grads[n]).abs().max() for n in grads) <= 2e-6 * max(1.0, scale)


def random_groups(policy, sizes, seed):
    """Groups of completions of the given numbers of tokens, of made-up ids."""
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for b, lengths in enumerate(sizes):
        prompt = policy.encode(make_question("q" * (1 + (seed + 3 * b) % 7)), make_clip(seed + b, 0.3 + 0.2 * (b % 3)))
        ids = [tuple(torch.randint(0, 250, (n,), generator=generator).tolist()) for n in lengths]
        groups.append(Group(prompt, tuple(Completion(i, (0.0,) * len(i), "", False, 0) for i in ids)))
    return groups


@settings(max_examples=20, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(
    sizes=st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=5), min_size=1, max_size=3).filter(
        lambda sizes: sum(map(sum, sizes)) > 0
    ),
    seed=st.integers(0, 10**6),
)
def test_a_shared_prompt_gives_the_numbers_of_separate_rows(policy, sizes, seed):
    groups = random_groups(policy, sizes, seed)
    shared, shared_grads = gradients(policy, groups, "shared", "right")
    separate, separate_grads = gradients(policy, groups, "separate", "right")
    assert (shared - separate).abs().max() <= 1e-5 * shared.abs().max()
    assert shared_grads.keys() == separate_grads.keys()
    for name, grad in separate_grads.items():
        assert (shared_grads[name] - grad).norm() <= 1e-5 * max(grad.norm(), 1e-3), name


def test_flex_attention_gives_the_same_log_probs(policy):
    groups = random_groups(policy, [[3, 0, 7], [5, 5]], 3)
    expected, policy.flex = logps(policy, groups), True
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("ignore")  # it is slow without a compiler, and says so
        flex = logps(policy, groups)
    assert (flex - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: FlexAttention has no backward pass on a CPU"
)
def test_flex_attention_gives_the_same_gradient(checkpoint):
    policy = Policy(checkpoint, LORA, prompt=make_prompt(), device="cuda")
    assert policy.flex
    groups = random_groups(policy, [[30, 0, 70], [50, 50]], 3)
    flex, flex_grads = gradients(policy, groups, "shared", "right")
    policy.flex = False
    expected, expected_grads = gradients(policy, groups, "shared", "right")
    assert (flex - expected).abs().max() <= 1e-4
    assert max((flex_grads[n] - expected_grads[n]).abs().max() for n in flex_grads) <= 1e-4


def test_in_bfloat16_the_shared_prompt_is_no_further_from_float32_than_separate_rows(policy, checkpoint):
    rough = Policy(checkpoint, LORA, prompt=make_prompt(), dtype="bfloat16").eval()
    rough.load_adapter({k: v.bfloat16() for k, v in policy.adapter().items()})
    policy.load_adapter({k: v.float() for k, v in rough.adapter().items()})
    groups = random_groups(policy, [[12, 9, 11, 4], [10, 12]], 5)
    exact = logps(policy, groups)
    error = {}
    for rough.layout in ("shared", "separate"):
        error[rough.layout] = (logps(rough, groups) - exact).square().mean().sqrt().item()
    assert 0 < error["shared"] <= 1.25 * error["separate"]  # both round, each in its own order


def test_full_fine_tuning_has_the_gradient_of_separate_rows_in_every_weight(checkpoint):
    whole = Policy(checkpoint, None, prompt=make_prompt())
    for p in (*whole.thinker.model.parameters(), *whole.thinker.lm_head.parameters()):
        p.requires_grad_(True)
    groups = random_groups(whole, [[4, 9], [6, 1]], 1)
    shared, shared_grads = gradients(whole, groups, "shared", "right")
    separate, separate_grads = gradients(whole, groups, "separate", "right")
    assert torch.allclose(shared, separate, atol=1e-5)
    names = {n for n, p in whole.named_parameters() if p.requires_grad}
    assert shared_grads.keys() == separate_grads.keys() == names and any("embed_tokens" in n for n in names)
    for name, grad in separate_grads.items():
        assert (shared_grads[name] - grad).norm() <= 1e-5 * max(grad.norm(), 1e-3), name


def test_an_adapter_on_the_audio_tower_learns(checkpoint):
    lora = LORA | {"targets": r"(audio_tower|model)\.layers\.\d+\.self_attn\.(q|v)_proj", "audio_tower": True}
    policy = Policy(checkpoint, lora, prompt=make_prompt()).eval()
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.1)
    groups = random_groups(policy, [[4, 9], [6, 1]], 1)
    logp, grads = gradients(policy, groups, "shared", "right")
    assert any("audio_tower" in n and g.abs().max() > 0 for n, g in grads.items())
    with policy.reference():
        assert not torch.allclose(logps(policy, groups), logp, atol=1e-4)
    assert policy.audio_cache.get(groups[0].prompt.clip_sha256) is None


def test_a_clip_is_heard_once(policy):
    calls = []
    policy.thinker.audio_tower.register_forward_hook(lambda *_: calls.append(1))
    groups = groups_of(policy)  # rollout
    logps(policy, groups)  # policy
    with policy.reference():
        logps(policy, groups)
    assert len(calls) == len(CLIPS)


def test_swapping_the_clip_changes_rollout_policy_and_reference(policy):
    groups = groups_of(policy)
    swapped = with_prompts(policy, groups, [make_clip(9, 0.6), *CLIPS[1:]])
    with policy.reference():
        reference, reference_swapped = logps(policy, groups), logps(policy, swapped)
    for before, after in [(logps(policy, groups), logps(policy, swapped)), (reference, reference_swapped)]:
        moved = (before - after).abs().amax(1)
        assert (moved[:3] > 1e-4).all(), "rows of the swapped question must move"
        assert (moved[3:] < 1e-5).all(), "rows of the other questions must not"
    again = groups_of(policy, clips=[make_clip(9, 0.6), *CLIPS[1:]])
    assert [c.sampler_logp for c in again[0].completions] != [c.sampler_logp for c in groups[0].completions]
    assert [c.token_ids for g in again[1:] for c in g.completions] == [
        c.token_ids for g in groups[1:] for c in g.completions
    ]


def test_features_stay_with_their_question_in_any_batch(policy):
    groups = groups_of(policy)
    together = logps(policy, groups)
    for b, group in enumerate(groups):
        alone = logps(policy, [group])
        assert torch.allclose(alone, together[3 * b : 3 * b + 3, : alone.shape[1]], atol=1e-5)


def test_wrong_number_of_audio_tokens_is_an_error(policy):
    groups = groups_of(policy)
    audio = policy.encode_audio([g.prompt for g in groups])
    with pytest.raises(ValueError, match=r"question first: .* audio placeholders"):
        policy.prepare(groups, [audio[1], audio[0], audio[2]])


def test_reference_is_the_model_without_its_adapter(policy, checkpoint):
    groups = groups_of(policy)
    plain = Policy(checkpoint, None, prompt=make_prompt()).eval()
    with policy.reference():
        reference = logps(policy, groups)
    assert torch.equal(reference, logps(plain, groups))
    assert not torch.allclose(reference, logps(policy, groups), atol=1e-3)


def test_fresh_adapter_is_the_reference(checkpoint):
    fresh = Policy(checkpoint, LORA, prompt=make_prompt()).eval()
    groups = groups_of(fresh)
    with fresh.reference():
        reference = logps(fresh, groups)
    assert torch.equal(reference, logps(fresh, groups))


def test_lora_on_the_audio_tower_is_refused_unless_asked_for(checkpoint):
    with pytest.raises(ValueError, match="audio tower"):
        Policy(checkpoint, LORA | {"targets": r".*\.(q|v)_proj"}, prompt=make_prompt())
    assert Policy(checkpoint, LORA | {"targets": r".*\.(q|v)_proj", "audio_tower": True}, prompt=make_prompt())


def test_only_the_adapter_is_trained(policy):
    assert all("lora_" in n and ".model.layers." in n for n, p in policy.named_parameters() if p.requires_grad)


def test_stop_token_is_in_the_loss_and_nothing_after_it(policy):
    stop = policy.stop_ids[0]
    prompt = policy.encode(QUESTIONS[0], CLIPS[0])
    cut = policy._cut([5, 6, stop, 7, stop])
    assert cut == [5, 6, stop]
    completion = Completion(tuple(cut), (0.0,) * 3, "", False, 0)
    longer = Completion((5, 6, 7, 8, 9), (0.0,) * 5, "", True, 0)
    logp = logps(policy, [Group(prompt, (completion, longer))])
    assert (logp[0, :3] != 0).all() and (logp[0, 3:] == 0).all() and (logp[1] != 0).all()


def test_empty_completion_is_survived(policy):
    prompt = policy.encode(QUESTIONS[0], CLIPS[0])
    some = Completion((5, 6, 7), (0.0,) * 3, "", True, 0)
    logp = logps(policy, [Group(prompt, (Completion((), (), "", True, 0), some))])
    alone = logps(policy, [Group(prompt, (some,))])
    assert logp.shape == (2, 3) and (logp[0] == 0).all() and torch.allclose(logp[1], alone[0], atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradient(policy, checkpoint):
    groups = groups_of(policy)
    _, plain = gradients(policy.train(), groups, "shared", "right")
    other = Policy(checkpoint, LORA, prompt=make_prompt(), gradient_checkpointing=True)
    other.load_adapter(policy.adapter())
    _, saved = gradients(other.train(), groups, "shared", "right")
    assert max((plain[n] - saved[n]).abs().max() for n in plain) <= 1e-6


def test_lora_starts_from_its_seed_and_scales_by_alpha_over_r(checkpoint):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (Policy(checkpoint, LORA | {"seed": s}, prompt=make_prompt()) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    (name, a), *_ = [(k, v) for k, v in one.adapter().items() if "lora_A" in k]
    assert torch.equal(a, same.adapter()[name]) and not torch.equal(a, other.adapter()[name])
    assert one.thinker.model.layers[0].self_attn.q_proj.scaling == {"default": LORA["alpha"] / LORA["r"]}


def test_an_adapter_of_another_shape_is_refused(policy):
    tensors = policy.adapter()
    name = next(iter(tensors))
    for wrong in ({k: v for k, v in tensors.items() if k != name}, tensors | {name: tensors[name][:1]}):
        with pytest.raises(ValueError, match=f"1 tensors differ, first '{name}'"):
            policy.load_adapter(wrong)


def test_ids_without_a_token_are_banned(policy):
    assert policy.thinker.lm_head.out_features > len(policy.tokenizer)
    assert set(range(len(policy.tokenizer), policy.thinker.lm_head.out_features)) <= set(policy.banned_ids)


def test_decode_leaves_out_the_stop_token_and_nothing_else(policy):
    ids = policy.tokenizer("rain")["input_ids"]
    audio = policy.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    assert policy.decode([*ids, policy.stop_ids[0]]) == policy.decode(ids) == "rain"
    assert policy.decode([*ids, audio]) == "rain<|AUDIO|>"


@pytest.mark.parametrize(
    ("question", "clip", "message"),
    [
        (make_question("x"), replace(make_clip(1), hz=8000), "clip at 8000 Hz, the model wants 16000"),
        (make_question("x", question="<|AUDIO|>?"), make_clip(1), "2 audio slots"),
        (make_question("x"), make_clip(1, 0.005), "no audio token"),
    ],
)
def test_what_cannot_be_encoded_is_named(policy, question, clip, message):
    with pytest.raises(ValueError, match=f"question x: .*{message}"):
        policy.encode(question, clip)
