"""The live stream: open visits and their scores, alerts, what survives a restart, and the feeds (lines, Kafka, MLLP).

No feed computes features of its own: every score is `ProductionPipeline.evaluate` over the visit's observations.
"""
