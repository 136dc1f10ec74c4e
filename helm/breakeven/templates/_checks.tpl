{{/* What each value allows, and all of them together do not: the code would refuse it in a pod, or
Ray would look for a node for ever. */}}
{{- define "breakeven.checkConfig" -}}
{{- $root := . -}}{{- $config := .Values.config -}}
{{- if and (eq (get $config "model" | default "default") "default") (not .Values.cache.claim) (not .Values.cache.create) -}}
{{- fail "config.model is `default`, which one pod makes in its cache, and without cache.claim the others have caches of their own: set config.model to a folder of the image (docker/Dockerfile.cpu has /opt/breakeven/models/SmolLM2-135M-Instruct) or to a name of the Hugging Face hub, or set cache.create=true" -}}
{{- end -}}
{{- if and (kindIs "map" (dig "tiers" "peer" nil $config)) (not (dig "tiers" "host" nil $config)) -}}
{{- fail "config.tiers.peer is set without config.tiers.host: peers read each other's host tier; set config.tiers.host.bytes, or leave peer out" -}}
{{- end -}}
{{- $ingresses := include "breakeven.pods" (list "ingress" .) | int -}}
{{- $catalogues := include "breakeven.catalogues" . | int -}}
{{- if gt $catalogues $ingresses -}}
{{- fail (printf "config.catalogue.replicas is %d, and each ingress pod has room for one: set it to config.ingress.replicas, %d, at most" $catalogues $ingresses) -}}
{{- end -}}
{{- range $group := list "ingress" "prefill" "decode" "vault" -}}
{{- if include "breakeven.pods" (list $group $root) | int -}}
{{- include "breakeven.checkCores" (list $group $root) -}}
{{- if and (has $group (list "prefill" "decode")) (eq (get $config "device") "cuda") -}}
{{- include "breakeven.checkGpus" (list $group $root) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "breakeven.checkCores" -}}
{{- $group := index . 0 -}}{{- $config := (index . 1).Values.config -}}
{{- $offered := include "breakeven.cores" . | float64 -}}
{{- $section := $group -}}{{- $cores := 0.0 -}}
{{- if eq $group "ingress" -}}
{{- $section = "ingress.cpus and config.catalogue" -}}
{{- $cores = addf (dig "ingress" "cpus" 1 $config) (dig "catalogue" "cpus" 0.5 $config) -}}
{{- else if eq $group "vault" -}}
{{- $section = "tiers.vault" -}}
{{- $cores = dig "tiers" "vault" "cpus" 0.5 $config | float64 -}}
{{- else -}}
{{- $cores = dig $group "cpus" 1 $config | float64 -}}
{{- end -}}
{{- if gt $cores $offered -}}
{{- fail (printf "config.%s.cpus: %v cores, and a pod offers %v to Ray, so that it would never be placed: set %v at most" $section $cores $offered $offered) -}}
{{- end -}}
{{- end }}

{{/* Each pod runs one engine. Ray is told of the first limit by name that KubeRay takes for GPUs
(IsGPUResourceKey), and of no other. */}}
{{- define "breakeven.checkGpus" -}}
{{- $group := index . 0 -}}{{- $root := index . 1 -}}{{- $config := $root.Values.config -}}
{{- $engine := mergeOverwrite (dict) (dig "engine" dict $config) (dig $group "engine" dict $config) -}}
{{- $ranks := mul (get $engine "tensor_parallel_size" | default 1 | int) (get $engine "pipeline_parallel_size" | default 1 | int) -}}
{{- $key := printf "groups.%s.resources.limits" $group -}}
{{- $gpus := 0 -}}
{{- range $name, $count := dig "limits" dict (index $root.Values.groups $group).resources -}}
{{- if and (eq $gpus 0) (regexMatch "gpu$|nvidia\\.com/mig-[0-9]+g\\.[0-9]+gb$" $name) -}}
{{- $gpus = int $count -}}
{{- end -}}
{{- end -}}
{{- if lt $gpus (int $ranks) -}}
{{- fail (printf "%s has %d GPUs, and an engine of config.%s takes %d (config.device is cuda; tensor by pipeline parallel size): set nvidia.com/gpu there to %d, or make the engine smaller" $key $gpus $group $ranks $ranks) -}}
{{- end -}}
{{- end }}

{{/* A pod whose Secret is missing waits for it in silence. `helm template` sees no server and looks
for none. Where there is one, Helm must be allowed to list Secrets: whoever keeps releases in them, as
it does unless HELM_DRIVER says otherwise, is; with another driver the role must say so. */}}
{{- define "breakeven.checkSecrets" -}}
{{- $secrets := .Values.secrets -}}{{- $namespace := .Release.Namespace -}}
{{- if not $secrets.keys -}}
{{- fail "secrets.keys: no Secret is named, and pods answer beyond loopback; make one with `kubectl create secret generic breakeven-keys --from-file=keys.yaml` (`breakeven key TENANT` prints a key and its line) and set secrets.keys=breakeven-keys" -}}
{{- end -}}
{{- $listed := lookup "v1" "Secret" $namespace "" | default dict -}}
{{- if hasKey $listed "items" -}}
{{- $there := dict -}}
{{- range $listed.items -}}{{- $_ := set $there .metadata.name true -}}{{- end -}}
{{- $wanted := list
  (list "secrets.keys" $secrets.keys "generic" "--from-file=keys.yaml")
  (list "secrets.cluster" $secrets.cluster "generic" "--from-literal=key=$(openssl rand -hex 32)")
  (list "secrets.ray" $secrets.ray "generic" "--from-literal=auth_token=$(openssl rand -hex 32)")
  (list "secrets.huggingFace" $secrets.huggingFace "generic" "--from-literal=token=$HF_TOKEN")
  (list "secrets.tls" $secrets.tls "tls" "--cert=tls.crt --key=tls.key")
  (list "redis.secret" .Values.redis.secret "generic" "--from-literal=password=$REDIS_PASSWORD") -}}
{{- range $wanted -}}
{{- $name := index . 1 -}}
{{- if and $name (not (hasKey $there $name)) -}}
{{- fail (printf "%s: there is no Secret %s in the namespace %s; make it with `kubectl -n %s create secret %s %s %s`" (index . 0) $name $namespace $namespace (index . 2) $name (index . 3)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}
