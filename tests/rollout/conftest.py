import pytest
import torch
from _support.backbones import toy_backbone, toy_config
from _support.rollout_cases import EOS, PIECES, SIZES, random_prompts
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {"<|end|>": EOS, **{piece: i + 1 for i, piece in enumerate(PIECES)}}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[("<", "a"), ("b", ">"), (">", "c")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", pad_token="<|end|>")


@pytest.fixture
def make_model():
    def make(name: str, dtype: torch.dtype = torch.float64, scale: float = 3.0, **settings):
        # spread logits: sharp attention, varied next tokens
        how = {"dtype": dtype, "seed": 6, "scale": scale, "embeddings": True}
        tied = {"tie_word_embeddings": name not in ("llama", "mistral", "qwen3")}
        return toy_backbone(name, **how, **SIZES, **tied, **settings).eval()

    return make


@pytest.fixture
def prompts() -> list[list[int]]:
    return random_prompts([9, 4, 13, 1])


@pytest.fixture(scope="module")
def toy_policy(tmp_path_factory, tokenizer):
    """(folder of a saved base model, that model with an adapter): large enough heads for vLLM."""
    torch.manual_seed(3)
    sizes = {
        "tie_word_embeddings": False,
        "hidden_size": 128,
        "intermediate_size": 192,
        "head_dim": 32,
        "vocab_size": 256,
    }
    config = toy_config("llama", **SIZES | sizes)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        base.lm_head.weight.mul_(8.0)
        base.lm_head.weight[1 + len(PIECES) :] = 0.0
    folder = tmp_path_factory.mktemp("toy")
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False)
    return str(folder), get_peft_model(base, lora).eval()
