"""Predictions on the transfer set: payloads, consensus rules and their codes."""

from tff_kd import _lazy

__getattr__, __dir__ = _lazy.attach(
    __name__,
    {
        **{
            name: name
            for name in (
                'alignment', 'codecs', 'coded', 'consensus', 'payload', 'rules',
            )
        },
        **{
            name: 'payload'
            for name in (
                'class_probabilities', 'Consensus', 'consensus_of', 'finite_rows',
                'KnowledgePayload', 'logits_shape', 'mean_of', 'payload_of',
                'predict_logits', 'without_rows',
            )
        },
        **{
            name: 'consensus'
            for name in (
                'CertaintyWeighted', 'CertaintyWithDiversity', 'check_rule',
                'ConsensusRule', 'MeanLogits', 'MeanProbabilities', 'WrappedRule',
            )
        },
        'Aligned': 'alignment',
        **{name: 'coded' for name in ('CodedRule', 'Quantized', 'TopClasses')},
    },
)
