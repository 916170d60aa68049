import pytest
import torch
from _support.rollout_toys import COMMON, CONFIGS, EOS, PIECES, random_prompts
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {"<|end|>": EOS, **{piece: i + 1 for i, piece in enumerate(PIECES)}}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[("<", "a"), ("b", ">"), (">", "c")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", pad_token="<|end|>")


@pytest.fixture
def make_model():
    def make(name: str, dtype: torch.dtype = torch.float64, scale: float = 3.0):
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:  # spread the logits: sharp attention, varied next tokens
                    parameter.mul_(scale)
        return model.eval()

    return make


@pytest.fixture
def prompts() -> list[list[int]]:
    return random_prompts([9, 4, 13, 1])


@pytest.fixture(scope="module")
def toy_policy(tmp_path_factory, tokenizer):
    """(folder of a saved base model, that model with an adapter): large enough heads for vLLM."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "vocab_size": 256}
    base = AutoModelForCausalLM.from_config(LlamaConfig(**COMMON | sizes), dtype=torch.float32)
    with torch.no_grad():
        base.lm_head.weight.mul_(8.0)
        base.lm_head.weight[1 + len(PIECES) :] = 0.0
    folder = tmp_path_factory.mktemp("toy")
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False)
    return str(folder), get_peft_model(base, lora).eval()
