{{/*
The configuration as Serve hands it to cluster.ray_service: the values' sections, and over them what
follows from running here. Each engine pod offers one place of its role, so that it runs one engine.
*/}}
{{- define "breakeven.config" -}}
{{- $ours := dict "host" "node" "ray" (dict "address" "auto") -}}
{{- range $role := list "prefill" "decode" -}}
{{- $_ := set $ours $role (dict "surge" false "resources" (dict (printf "breakeven_%s" $role) 1)) -}}
{{- end -}}
{{- $keys := "/etc/breakeven/keys/keys.yaml" -}}
{{- $ingress := dict "host" "0.0.0.0" "port" 8000 "keys_file" $keys "resources" (dict "breakeven_ingress" 1) -}}
{{- with .Values.secrets.tls -}}
{{- $_ := set $ingress "tls_cert_file" "/etc/breakeven/tls/tls.crt" -}}
{{- $_ := set $ingress "tls_key_file" "/etc/breakeven/tls/tls.key" -}}
{{- end -}}
{{- $_ := set $ours "ingress" $ingress -}}
{{- $catalogues := include "breakeven.catalogues" . | int -}}
{{- $_ := set $ours "catalogue" (dict "replicas" $catalogues "resources" (dict "breakeven_catalogue" 1)) -}}
{{- $_ := set $ours "metrics" (dict "port" 9464) -}}
{{- if include "breakeven.shards" . | int -}}
{{- $_ := set $ours "tiers" (dict "vault" (dict "resources" (dict "breakeven_vault" 1))) -}}
{{- end -}}
{{- mergeOverwrite (deepCopy .Values.config) $ours | toYaml -}}
{{- end }}

{{- define "breakeven.shards" -}}
{{- $vault := dig "tiers" "vault" nil .Values.config -}}
{{- if $vault }}{{ get $vault "shards" | default 1 }}{{ else }}0{{ end -}}
{{- end }}

{{/* A pod is a node to Ray: each ingress has a catalogue on its own, unless fewer are asked for. */}}
{{- define "breakeven.catalogues" -}}
{{ dig "catalogue" "replicas" (include "breakeven.pods" (list "ingress" .)) .Values.config }}
{{- end }}

{{/* How many pods a group has: as many as the configuration has replicas. */}}
{{- define "breakeven.pods" -}}
{{- $group := index . 0 -}}{{- $root := index . 1 -}}
{{- if eq $group "head" -}}
1
{{- else if eq $group "vault" -}}
{{ include "breakeven.shards" $root }}
{{- else -}}
{{ dig $group "replicas" 1 $root.Values.config }}
{{- end -}}
{{- end }}
