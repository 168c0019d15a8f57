"""Backfill on Spark: java.py finds a Java, session.py starts Spark on it, job.py joins partitions in Spark's tasks.

Nothing here is imported before `headrace backfill --engine spark` asks for it; pyspark is the extra `spark`.
"""
