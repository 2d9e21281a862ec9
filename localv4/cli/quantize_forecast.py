"""What the result of a conversion will need and how fast it will be on this machine."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from localv4.model.config import ModelConfig
    from localv4.planning.model_facts import ModelFacts
    from quant.decision import Plan


def forecast_line(plan: "Plan", config: "ModelConfig", name: str, recipe: str) -> str:
    """Return one line: does it fit into memory, and how fast; measures nothing."""
    from localv4.cli.plan_report import bounds_text
    from localv4.planning.assessment import assess
    from localv4.planning.measuring import known_machine

    machine = known_machine(None)
    found = assess(facts_of_plan(plan, config, name, recipe), machine)
    if found.refusal is not None:
        return f"on this machine: {found.refusal.message}"
    verdict = {"fits": "it fits into memory", "pages": "its experts are paged from disk"}
    line = f"on this machine: {verdict[found.verdict]}"
    if found.forecast is not None:
        decode = found.forecast.decode
        line += f", {bounds_text(decode)} tokens/s"
    return line


def facts_of_plan(plan: "Plan", config: "ModelConfig", name: str, recipe: str) -> "ModelFacts":
    """Return what the result costs, from what was decided about each matrix."""
    from localv4.planning.model_facts import HEAD, ModelFacts, Part
    from quant.tensor_class import TensorClass

    experts = [0] * config.n_layers
    parts = []
    formats: dict[TensorClass, str] = {}
    for decision in plan.decisions:
        if decision.kind in (TensorClass.GATE_UP, TensorClass.DOWN):
            assert decision.layer is not None
            experts[decision.layer] += decision.nbytes
            formats[decision.kind] = decision.format
        elif decision.kind is not TensorClass.EMBEDDING:
            component = HEAD if decision.kind is TensorClass.HEAD else decision.kind.value
            parts.append(Part(component, decision.format, decision.nbytes, decision.nbytes))
    return ModelFacts(
        name=name,
        quant=recipe,
        config=config,
        parts=tuple(parts),
        expert_bytes=tuple(nbytes // config.n_experts for nbytes in experts),
        expert_format="+".join(dict.fromkeys(formats.values())),
        file_bytes=plan.nbytes,
    )
