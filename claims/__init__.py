"""The paper's claims, each checked by one command: python -m claims.scores, table1, figures, speed."""
