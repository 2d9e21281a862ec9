"""`localv4 eval`: the quality of a model, in figures that others can check."""

import typer

from localv4.cli import (
    evaluate_card,
    evaluate_imatrix,
    evaluate_kld,
    evaluate_logits,
    evaluate_ppl,
)

app = typer.Typer(help="Measure the quality of a model and of an engine.", no_args_is_help=True)
app.command("ppl")(evaluate_ppl.ppl)
app.command("kld")(evaluate_kld.kld)
app.command("logits")(evaluate_logits.logits)
app.command("imatrix")(evaluate_imatrix.imatrix)
app.command("card")(evaluate_card.card)
