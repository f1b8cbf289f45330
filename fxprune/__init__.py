"""fxprune: a model-surgery compiler over torch.fx graphs.

    gated = fxprune.instrument(model)        # learn width and depth while training
    small = fxprune.finalize(gated)          # a smaller, plain model, proved equal
    fxprune.export_onnx(small, "small.onnx")

After Srinivas & Babu, "Learning Neural Network Architectures using Backpropagation", BMVC 2016.
"""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

if not (Path(__file__).parent / "passes").is_dir():
    raise ImportError(
        "fxprune/passes, a link to ../passes, was lost in this checkout; restore it with "
        "`git checkout fxprune/passes` (on Windows after `git config core.symlinks true`), or "
        "install the package"
    )

from fxprune.compiler import finalize, instrument
from fxprune.costs import Costs, count_costs
from fxprune.deployment.export import OnnxCheck, export_onnx
from fxprune.errors import (
    BudgetError,
    ExampleInputError,
    ExportError,
    FxpruneError,
    GateError,
    ModelError,
    NothingToDoError,
    TraceError,
    VerificationError,
)
from fxprune.gating.optimizer_groups import parameter_groups, require_undecayed
from fxprune.gating.penalties import Cost, Penalty, paper_penalties, penalty
from fxprune.gating.sharding import replicate_gates
from fxprune.inspection import Inspection, architecture, freeze, inspect
from fxprune.proof.verification import Verification, verify
from fxprune.report import Report
from fxprune.training.budget import Budget, Phases
from fxprune.training.compaction import compact

try:
    __version__ = version("fxprune")
except PackageNotFoundError:  # a bare checkout on the path
    __version__ = "0+unknown"

__all__ = [
    "Budget",
    "BudgetError",
    "Cost",
    "Costs",
    "ExampleInputError",
    "ExportError",
    "FxpruneError",
    "GateError",
    "Inspection",
    "ModelError",
    "NothingToDoError",
    "OnnxCheck",
    "Penalty",
    "Phases",
    "Report",
    "TraceError",
    "Verification",
    "VerificationError",
    "architecture",
    "compact",
    "count_costs",
    "export_onnx",
    "finalize",
    "freeze",
    "inspect",
    "instrument",
    "paper_penalties",
    "parameter_groups",
    "penalty",
    "replicate_gates",
    "require_undecayed",
    "verify",
]
