"""Names of metrics: of options, of fields of `Evaluation`, and as people read them."""

SINGLE_LABEL = ("accuracy", "balanced_accuracy", "macro_f1", "log_loss", "auc")
MULTI_LABEL = ("mean_average_precision", "macro_f1", "log_loss", "auc")

FIELDS = {name: name for name in (*SINGLE_LABEL, *MULTI_LABEL)} | {"auc": "roc_auc"}
"""Field of `Evaluation` by the name of a metric."""

LABELS = {
    "accuracy": "accuracy",
    "mean_average_precision": "mean average precision",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "roc_auc": "ROC AUC",
    "log_loss": "log loss",
}
"""Names of metrics as people read them, by field, in the order of tables."""


def label(name: str) -> str:
    """Writes the name of a metric or split in words: `auc` becomes ROC AUC."""
    return LABELS.get(FIELDS.get(name, name), name.replace("_", " "))
