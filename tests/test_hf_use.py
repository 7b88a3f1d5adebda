"""What users of transformers do with an exported folder: load it in a process of their own, chat, fine-tune, compile."""

import subprocess
import sys

import numpy as np
import pytest
from exports import MODEL, make_pieces, make_run

from slimmoe_jax import convert
from slimmoe_jax.config import DataConfig, TrainConfig
from slimmoe_jax.data import chat, stdlib

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A chat model of random weights."""
    path = tmp_path_factory.mktemp("use")
    pieces = make_pieces(path / "tokenizer.model")
    data = DataConfig(source="stdlib", format="chat", context=256, tokenizer=str(pieces.path))
    make_run(path / "run", TrainConfig(name="little", model=MODEL, data=data), pieces)
    convert.main(["--checkpoint", str(path / "run"), "--out", str(path / "little-hf"), "--verify", "False"])
    return path / "little-hf"


def load(folder):
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return network, transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def test_loading_leaves_nothing_to_chance(folder):
    """Models are built without storage: what is in no checkpoint, the rotary frequencies, must be filled in again."""
    network, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    (rotary,) = network.model.rotary_embs.values()
    np.testing.assert_allclose(rotary.inv_freq, 10_000.0 ** -(np.arange(0, 8, 2) / 8), rtol=1e-6)
    # A copy of the folder's code runs, not this package's.
    assert type(network).__module__.startswith("transformers_modules.")


def test_the_code_of_a_folder_stands_alone(folder):
    """Without this package on the path, in a process of its own."""
    program = f"""
import sys
sys.path = [p for p in sys.path if p]
class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("slimmoe_jax", "jax", "flax"):
            raise ImportError("not here: " + name)
sys.meta_path.insert(0, Refuse())
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
print(AutoConfig.from_pretrained({str(folder)!r}, trust_remote_code=True).layer_key_value_heads())
print(type(AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)).__name__)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=folder.parent, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split("\n")[:2] == ["[4, 2]", "SlimMoEModel"], done.stderr


def test_a_folder_saved_again_loads_again(folder, tmp_path):
    network, tokenizer = load(folder)
    network.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    again, tokenizer_again = load(tmp_path / "again")
    assert again.state_dict().keys() == network.state_dict().keys()
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=0)
    assert tokenizer_again.chat_template == tokenizer.chat_template and again.config.per_layer_config[1].num_key_value_heads == 2


def test_a_pipeline_answers_messages(folder):
    network, tokenizer = load(folder)
    talk = transformers.pipeline("text-generation", model=network, tokenizer=tokenizer)
    messages = [{"role": "user", "content": "What does `json.dumps` do?"}]
    (answer,) = talk(messages, max_new_tokens=8, do_sample=False)
    reply = answer["generated_text"][-1]
    assert reply["role"] == "assistant" and isinstance(reply["content"], str)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ids = network.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert reply["content"] == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_batch_padded_on_the_left_gives_each_prompts_own_tokens(folder):
    network, tokenizer = load(folder)
    prompts = ["The module", "What does `json.dumps` do, and what does it return?", "x"]
    options = dict(max_new_tokens=16, min_new_tokens=16, do_sample=False)
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    assert (batch["attention_mask"][:, 0] == 0).sum() == 2 and (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()
    together = network.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for prompt, tokens in zip(prompts, together, strict=True):
        alone = tokenizer(prompt, return_tensors="pt")
        assert tokens.tolist() == network.generate(**alone, **options)[0, alone["input_ids"].shape[1] :].tolist()


# --- fine-tuning -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def conversations(folder):
    """Short ones, and each one's tokens that our own training would predict."""
    pieces = convert.tokenizer_files.read(folder)
    fitting = {}
    for messages in stdlib.conversations():
        encoded = chat.encode(chat.turns_of(messages), pieces, 128)
        if encoded and not encoded.cut:
            fitting[tuple(np.array(encoded.tokens)[np.array(encoded.targets)].tolist())] = messages
        if len(fitting) == 32:
            return fitting


def fine_tune(folder, conversations, out, learning_rate=5e-3, peft_config=None):
    """Some steps of TRL's SFTTrainer, with loss on the assistant's turns alone: the trainer, and the losses."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    network, tokenizer = load(folder)
    rows = datasets.Dataset.from_list([{"messages": messages} for messages in conversations.values()])
    settings = trl.SFTConfig(
        output_dir=str(out), max_steps=12, per_device_train_batch_size=4, learning_rate=learning_rate, lr_scheduler_type="constant",
        logging_steps=1, report_to=[], save_strategy="no", assistant_only_loss=True, use_cpu=True, bf16=False, max_length=128,
        disable_tqdm=True, gradient_checkpointing=False, seed=0,
    )  # fmt: skip
    trainer = trl.SFTTrainer(network, args=settings, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config)
    trainer.train()
    return trainer, [row["loss"] for row in trainer.state.log_history if "loss" in row]


def step_of_trainer(folder, rows, out, **settings):
    """One step of plain gradient descent by transformers' `Trainer`, with the auxiliary loss: the network and the loss."""
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dropout=0.0)
    network.config.output_router_logits, network.config.router_aux_loss_coef = True, 1.0
    arguments = transformers.TrainingArguments(
        output_dir=str(out), max_steps=1, learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0,
        report_to=[], use_cpu=True, logging_steps=1, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, **settings,
    )  # fmt: skip
    trainer = transformers.Trainer(network, args=arguments, train_dataset=rows)
    trainer.train()
    return network, trainer.state.log_history[0]["loss"]


def test_trainer_weighs_the_auxiliary_loss_the_same_however_it_accumulates(folder, tmp_path):
    """Equal rows, so that the routing statistics of a micro-batch are those of the batch."""
    tokens = list(range(2, 22))
    rows = [{"input_ids": [0] * 5 + tokens, "attention_mask": [0] * 5 + [1] * 20, "labels": [-100] * 5 + tokens}] * 4
    whole, loss = step_of_trainer(folder, rows, tmp_path, per_device_train_batch_size=4)
    cut, its_loss = step_of_trainer(folder, rows, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    np.testing.assert_allclose(its_loss, loss, rtol=1e-5)
    for name, weight in whole.named_parameters():
        torch.testing.assert_close(cut.get_parameter(name), weight, rtol=1e-5, atol=1e-6, msg=name)


def test_trainer_in_bfloat16_keeps_routers_in_float32(folder, tmp_path, monkeypatch):
    modeling = sys.modules[type(load(folder)[0]).__module__]
    forward, seen = modeling.SlimMoERouter.forward, []

    def watched(self, hidden_states):
        out = forward(self, hidden_states)
        seen.append((torch.is_autocast_enabled("cpu"), out[0].dtype))
        return out

    monkeypatch.setattr(modeling.SlimMoERouter, "forward", watched)
    rows = [{"input_ids": list(range(2, 22)), "labels": list(range(2, 22))}] * 2
    step_of_trainer(folder, rows, tmp_path, per_device_train_batch_size=2, bf16=True)
    assert seen == [(True, torch.float32)] * 2


@pytest.mark.slow
def test_trl_fine_tunes_on_the_tokens_that_our_training_would(folder, conversations, tmp_path):
    trainer, losses = fine_tune(folder, conversations, tmp_path)
    assert np.mean(losses[-3:]) < losses[0] - 0.5, losses
    labels = next(iter(trainer.get_train_dataloader()))["labels"]
    assert {tuple(row[row != -100].tolist()) for row in labels} <= conversations.keys() and len(labels) == 4
    # TRL asks mixtures of experts for their auxiliary loss: two experts of four, evenly used, would give 2.
    assert 1 < trainer.state.log_history[0]["aux_loss"] < 3


@pytest.mark.slow
def test_a_lora_of_peft_learns(folder, conversations, tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    trainer, losses = fine_tune(folder, conversations, tmp_path, learning_rate=5e-2, peft_config=lora)
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.3, losses
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
