"""The served models: the architectures whose attention is SGLang's ``DeepseekV2AttentionMLA`` and nothing else.

A model may have a latent cache and still not go through the hooked layer (``attention_layer.py``), or keep state beside
the cache that no transfer moves. So the list is closed: any other model is refused, and models that users ask for are
refused with a specific reason. The names are those in ``architectures`` of a model's ``config.json``.
"""

from collections.abc import Iterable

from sglang_tpla.config import ConfigError

SERVED = {
    "DeepseekV2ForCausalLM": "DeepSeek V2 and V2.5",
    "DeepseekV3ForCausalLM": "DeepSeek V3, R1 and V3.1, Moonlight, Kimi K2 and K2 Thinking, GigaChat3",
    "KimiK25ForConditionalGeneration": "Kimi K2.5, K2.6 and K2.7",
    "KimiVLForConditionalGeneration": "Kimi-VL",
    "DeepseekVL2ForCausalLM": "DeepSeek-VL2",
    "Glm4MoeLiteForCausalLM": "GLM-4.7-Flash",
}
_SPARSE = "its indexer (DeepSeek sparse attention) needs the whole latent on every rank"
_LINEAR = "the state of its linear-attention layers is not transferred"
_OWN = "its attention is a class of its own, which is not hooked"
_MISTRAL = "it scales queries by their position, and its checkpoints are in Mistral's own format"
REFUSED = {
    "DeepseekV32ForCausalLM": _SPARSE,
    "GlmMoeDsaForCausalLM": _SPARSE,
    "Glm5NextForConditionalGeneration": _SPARSE,
    "HYV4ForCausalLM": _SPARSE,
    "Dots3NoteForCausalLM": _SPARSE,
    "DeepseekV4ForCausalLM": "its cache is no latent of multi-head latent attention",
    "LongcatFlashForCausalLM": "it has two attentions a layer and loads their absorbed weights itself",
    "KimiLinearForCausalLM": _LINEAR,
    "KimiK3ForConditionalGeneration": _LINEAR,
    "KimiK3LinearForCausalLM": _LINEAR,
    "BailingMoeV2_5ForCausalLM": _LINEAR,
    "BailingMoeV3ForCausalLM": _LINEAR,
    "BailingMoeV3VLForConditionalGeneration": _LINEAR,
    "GigaChat35ForCausalLM": _LINEAR,
    "SarvamMLAForCausalLM": _OWN,
    "MiniCPM3ForCausalLM": _OWN,
    "MistralLarge3ForCausalLM": _MISTRAL,
    "PixtralForConditionalGeneration": _MISTRAL,
    "Mistral4ForCausalLM": _MISTRAL,
    "DeepseekOCRForCausalLM": "it was never tried",
    "DotsVLMForCausalLM": "it was never tried",
}


def check_architectures(model_path: str, names: Iterable[str]) -> None:
    """Refuse a model whose architecture is not served.

    Args:
        names: ``architectures`` of its config; a config without any passes.

    Raises:
        ConfigError: naming the architecture, the reason and the served models.
    """
    for name in names:
        if name in SERVED:
            continue
        reason = REFUSED.get(name, "it is not among the architectures that were tried")
        served = "; ".join(f"{known} ({models})" for known, models in SERVED.items())
        raise ConfigError(
            f"{model_path} is a {name}, which sglang_tpla does not serve: {reason}; serve it with stock SGLang. "
            f"Served are {served}"
        )
