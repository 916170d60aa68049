import pytest
import torch
from rollout_toys import CONFIGS, EOS, PIECES, random_prompts
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
