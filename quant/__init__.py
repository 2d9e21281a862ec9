"""The offline side: turning published weights into smaller ones. The engine never imports it."""
